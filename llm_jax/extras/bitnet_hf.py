"""The matrices of BitNet checkpoints of transformers (pack_weights in its integrations/bitnet.py).

A matrix is [outputs, inputs], as torch's; that of bitnet.py, [inputs, outputs], has to be transposed. Beside it lies
its weight_scale: the mean of |w| where the config's linear_class is autobitlinear, else 1 over that (class BitLinear).
"""

from __future__ import annotations

import numpy as np

SHIFTS_4 = np.arange(0, 8, 2, dtype=np.uint8)


def pack_hf(codes_OI: np.ndarray) -> np.ndarray:
  """uint8 [O / 4, I] of codes -1, 0, 1: byte r has the outputs r, r + O / 4, r + O / 2 and r + 3 O / 4.

  Two bits have code + 1, those of the first output are the lowest. Raises ValueError for other values or sizes.
  """
  codes_OI = np.asarray(codes_OI)
  if codes_OI.ndim != 2 or codes_OI.shape[0] % 4:
    raise ValueError(f'outputs must be a multiple of 4 in a matrix [outputs, inputs]; got {codes_OI.shape}')
  if not np.isin(codes_OI, (-1, 0, 1)).all():
    raise ValueError('codes must be -1, 0 and 1')
  bits_4RI = (codes_OI + 1).astype(np.uint8).reshape(4, -1, codes_OI.shape[1])
  # In C order, as safetensors writes the memory of an array.
  return np.ascontiguousarray(np.bitwise_or.reduce(bits_4RI << SHIFTS_4[:, None, None], axis=0))


def unpack_hf(packed_RI: np.ndarray) -> np.ndarray:
  """The inverse of `pack_hf`: int8 [O, I] of -1, 0 and 1."""
  bits_4RI = (np.asarray(packed_RI) >> SHIFTS_4[:, None, None]) & 3
  return bits_4RI.reshape(-1, packed_RI.shape[1]).astype(np.int8) - 1

"""Tokenizers of other libraries: SentencePiece models and tiktoken's encodings, saved completely in our JSON."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.tokenizers import bpe
from llm_jax.data.tokenizers.bpe import empty_table, utf8
from llm_jax.data.tokenizers.tokenizer import OPENED


class SentencePieceTokenizer:
  """A SentencePiece model. Its pieces write spaces as U+2581, so U+2581 in a text is decoded as a space."""

  def __init__(self, proto: bytes):
    try:
      import sentencepiece
    except ImportError:
      raise ConfigError("SentencePiece models need the package sentencepiece: pip install 'llm_jax[data]'") from None
    self.proto = proto
    self._model = model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(proto)
    specials = [i for i in (model.bos_id(), model.eos_id()) if i >= 0]
    if not specials:
      raise ConfigError('the SentencePiece model has neither a bos nor an eos token to separate documents; '
                        'train it with --bos_id and --eos_id of 0 or more')
    self.bos_id, self.eos_id = specials[0], specials[-1]
    self.token_bytes = [_piece_bytes(model, i) for i in range(model.GetPieceSize())]

  @classmethod
  def open(cls, name: str) -> SentencePieceTokenizer:
    """Opens a model. Raises DataError when it is missing or damaged, ConfigError when it has neither bos nor eos."""
    path = Path(name).expanduser()
    try:
      return cls(path.read_bytes())
    except OSError as e:
      raise DataError(f'{path}: the tokenizer cannot be read: {e.strerror}') from None
    except ConfigError as e:
      raise ConfigError(f'{path}: {e}') from None
    except RuntimeError as e:
      raise DataError(f'{path}: not a SentencePiece model ({e})') from None

  @classmethod
  def from_json(cls, spec: dict) -> SentencePieceTokenizer:
    return cls(base64.b64decode(spec['model'], validate=True))

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    for text in texts:
      utf8(text)
    return [np.array(ids, np.uint32) for ids in self._model.EncodeAsIds(texts)]

  def to_json(self) -> str:
    return json.dumps({'type': 'sentencepiece', 'model': base64.b64encode(self.proto).decode()})


def _piece_bytes(model: Any, i: int) -> bytes:
  if model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i):
    return b''
  piece = model.IdToPiece(i)
  return bytes([int(piece[3:5], 16)]) if model.IsByte(i) else piece.replace('\u2581', ' ').encode()


class TiktokenTokenizer:
  """Byte-level BPE that merges pairs in the order of ids."""

  def __init__(self, pattern: str, ranks: dict[bytes, int], eot_id: int):
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
      raise DataError(f'the encoding has no token for byte {missing[0]:#04x}')
    if len({eot_id, *ranks.values()}) != len(ranks) + 1:
      raise DataError('the encoding has two tokens with one id')
    self.pattern, self.ranks = pattern, ranks
    self.bos_id = self.eos_id = eot_id
    self.token_bytes = empty_table(1 + max(eot_id, *ranks.values()))
    for token, i in ranks.items():
      self.token_bytes[i] = token
    self._model = bpe.open_bpe(ranks, pattern)

  @classmethod
  def open(cls, name: str) -> TiktokenTokenizer:
    """An encoding by name, from TIKTOKEN_CACHE_DIR or the network. Raises ConfigError, DataError."""
    known = tiktoken.list_encoding_names()
    if name not in known:
      raise ConfigError(f'tiktoken has no encoding {name!r}; it has {", ".join(sorted(known))}')
    try:
      model = tiktoken.get_encoding(name)
    except Exception as e:
      raise DataError(f'tiktoken:{name} is not in TIKTOKEN_CACHE_DIR and cannot be downloaded ({type(e).__name__}); '
                      'download it on a machine with a network, with TIKTOKEN_CACHE_DIR set, and copy that folder'
                      ) from None
    return cls(model._pat_str, model._mergeable_ranks, model.eot_token)

  @classmethod
  def from_json(cls, spec: dict) -> TiktokenTokenizer:
    ranks = {base64.b64decode(token): i for token, i in spec['ranks'].items()}
    return cls(spec['pattern'], ranks, spec['eot_id'])

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return bpe.encode(self._model, texts)

  def to_json(self) -> str:
    ranks = {base64.b64encode(token).decode(): i for token, i in self.ranks.items()}
    return json.dumps({'type': 'tiktoken', 'pattern': self.pattern, 'eot_id': self.bos_id, 'ranks': ranks})


register(OPENED, 'sentencepiece', SentencePieceTokenizer, NoSettings)
register(OPENED, 'tiktoken', TiktokenTokenizer, NoSettings)

"""SentencePiece models as tokenizers of the library `tokenizers`, for tokenizer.json; compared by ids before use."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llm_jax.base.errors import ConfigError

SPACE = '\u2581'
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces
UNIGRAM, BPE = 1, 2
NUM_TEXTS = 200  # on which the ids are compared
TEXTS = ('', ' ', 'The quick brown fox, 3.14 times!', '  two  spaces\n\tand a tab\n', ' a', 'a  ', 'x\u00a0y\u3000z',
         'caf\u00e9 \u4e2d\u6587 \U0001f600', '\ufb01ne e\u0301', '\u2581 a\u2581b')


def library_of(proto: bytes) -> tokenizers.Tokenizer:
  """A tokenizer with the ids of the SentencePiece model. Raises ConfigError if there is none."""
  try:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as e:
    raise ConfigError(f'a SentencePiece model is written as tokenizer.json by the packages sentencepiece and protobuf: '
                      f"pip install 'llm_jax[data]' protobuf ({e})") from None
  spec: Any = vars(sentencepiece_model_pb2)['ModelProto'].FromString(proto)
  if spec.trainer_spec.model_type not in (UNIGRAM, BPE) or spec.trainer_spec.treat_whitespace_as_suffix or (
      not spec.normalizer_spec.escape_whitespaces):
    raise ConfigError('the SentencePiece model is of a kind that has no form as tokenizer.json; llm-jax export '
                      '--format=llm_jax writes it for this package')
  library = _library(spec)
  model = sentencepiece.SentencePieceProcessor()
  model.LoadFromSerializedProto(proto)
  for text in _texts([piece.piece for piece in spec.pieces if piece.type in (NORMAL, USER_DEFINED)]):
    wanted, got = model.EncodeAsIds(text), library.encode(text, add_special_tokens=False).ids
    if wanted != got:
      raise ConfigError(f'the SentencePiece model has no form as tokenizer.json with the same ids: those of {text!r} '
                        f'are {wanted[:12]}, and would be {got[:12]}; llm-jax export --format=llm_jax writes it for '
                        'this package')
  library.add_special_tokens([piece.piece for piece in spec.pieces if piece.type == CONTROL])
  return library


def _library(spec: Any) -> tokenizers.Tokenizer:
  """The tokenizer without special tokens."""
  has_prefix, has_bytes = spec.normalizer_spec.add_dummy_prefix, spec.trainer_spec.byte_fallback
  own = sorted((piece.piece for piece in spec.pieces if piece.type == USER_DEFINED), key=len, reverse=True)
  library = tokenizers.Tokenizer(_model(spec, has_bytes, ignore_merges=bool(own)))
  library.normalizer = _normalizer(spec.normalizer_spec)
  if own:  # such pieces are found first, the longest at each place
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex('|'.join(map(re.escape, own))), 'isolated')
  steps = [decoders.Replace(SPACE, ' '), *([decoders.ByteFallback()] if has_bytes else []), decoders.Fuse(),
           *([decoders.Strip(' ', 1, 0)] if has_prefix else [])]
  library.decoder = decoders.Sequence(steps)
  return library


def _normalizer(spec: Any) -> normalizers.Normalizer:
  """Characters first, then spaces, as SentencePiece does."""
  steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Replace(tokenizers.Regex(before), after) for before, after in ((r'\A +| +\z', ''),
                                                                                         (' {2,}', ' '))]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(SPACE))
  return normalizers.Sequence([*steps, normalizers.Replace(' ', SPACE)])


def _model(spec: Any, has_bytes: bool, ignore_merges: bool) -> Any:
  if spec.trainer_spec.model_type == UNIGRAM:
    return models.Unigram([(piece.piece, piece.score) for piece in spec.pieces], spec.trainer_spec.unk_id, has_bytes)
  scores = {piece.piece: (-piece.score, i) for i, piece in enumerate(spec.pieces) if piece.type == NORMAL}
  # Two neighbours are merged if together they are a piece, the best piece first.
  pairs = sorted((rank, piece[:i], piece[i:]) for piece, rank in scores.items() for i in range(1, len(piece))
                 if piece[:i] in scores and piece[i:] in scores)
  return models.BPE({piece.piece: i for i, piece in enumerate(spec.pieces)}, [(a, b) for _, a, b in pairs],
                    unk_token=spec.pieces[spec.trainer_spec.unk_id].piece, fuse_unk=True, byte_fallback=has_bytes,
                    ignore_merges=ignore_merges)


def _texts(pieces: list[str]) -> Iterator[str]:
  """Fixed texts, and rows of pieces and of their characters."""
  yield from TEXTS
  rng, letters = random.Random(0), sorted(set(''.join(pieces)))
  for i in range(NUM_TEXTS):
    source = pieces if i % 2 else letters
    yield ''.join(rng.choice(source) for _ in range(rng.randrange(1, 40))).replace(SPACE, ' ')

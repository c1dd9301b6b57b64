"""Tokenizers of this package as files of transformers: tokenizer.json, tokenizer_config.json, the chat template."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, processors

from llm_jax.base.errors import ConfigError
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.tokenizers.bpe import byte_alphabet
from llm_jax.data.tokenizers.huggingface import EOT, HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, ExtendedTokenizer
from llm_jax.hf.pieces import library_of

EVERYTHING = '[\\s\\S]'  # one character


def tokenizer_files(tokenizer: Any, max_len: int) -> dict[str, str]:
  """{name: content}. Raises ConfigError for a tokenizer that transformers cannot have."""
  library = to_library(tokenizer)
  files = dict(getattr(tokenizer, 'files', {}))  # of a chat template
  values = json.loads(files.get('tokenizer_config.json', '{}'))
  values |= {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': max_len,
             'clean_up_tokenization_spaces': False,
             'bos_token': values.get('bos_token') or library.id_to_token(tokenizer.bos_id),
             'eos_token': values.get('eos_token') or library.id_to_token(tokenizer.eos_id)}
  values.setdefault('pad_token', values['eos_token'])
  return files | {'tokenizer.json': library.to_str(pretty=True),
                  'tokenizer_config.json': json.dumps(values, indent=2, ensure_ascii=False) + '\n'}


def to_library(tokenizer: Any) -> tokenizers.Tokenizer:
  """The tokenizer of the library `tokenizers` with the same ids. Raises ConfigError if there is none."""
  if isinstance(tokenizer, ChatTokenizer):
    return to_library(tokenizer.base)
  if isinstance(tokenizer, ExtendedTokenizer):
    library = to_library(tokenizer.base)
    library.add_special_tokens(list(tokenizer.special_tokens))
    return library
  if isinstance(tokenizer, HuggingFaceTokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.to_library_json())
    own = json.loads(library.to_str())['post_processor'] or not tokenizer.leads
    return library if own else _beginning_with_bos(library, tokenizer)
  if isinstance(tokenizer, ByteTokenizer):
    return _beginning_with_bos(_of_bytes(), tokenizer)
  if isinstance(tokenizer, CharTokenizer):
    return _beginning_with_bos(_of_characters(tokenizer), tokenizer)
  if isinstance(proto := getattr(tokenizer, 'proto', None), bytes):
    library = library_of(proto)
    return _beginning_with_bos(library, tokenizer) if getattr(tokenizer, 'leads', True) else library
  if hasattr(tokenizer, 'words') and hasattr(tokenizer, 'pattern'):
    return _beginning_with_bos(_of_words(tokenizer), tokenizer)
  kind = json.loads(tokenizer.to_json()).get('type', type(tokenizer).__name__)
  raise ConfigError(f'a tokenizer of type {kind} has no form as tokenizer.json; llm-jax export --format=llm_jax writes '
                    'it for this package')


def _of_bytes() -> tokenizers.Tokenizer:
  byte_of = byte_alphabet()
  library = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for c, i in byte_of.items()}, []))
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  library.decoder = decoders.ByteLevel()
  library.add_special_tokens([EOT])
  return library


def _of_characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
  """An unknown character becomes the special token; this package raises an error for it."""
  vocab = {c: i for i, c in enumerate(tokenizer.chars)} | {EOT: tokenizer.eos_id}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=EOT))
  library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(EVERYTHING), 'isolated')
  library.decoder = decoders.Fuse()
  library.add_special_tokens([EOT])
  return library


def _of_words(tokenizer: Any) -> tokenizers.Tokenizer:
  from llm_jax.extras.word_tokenizer import SPECIALS, UNK
  vocab = {word: i for i, word in enumerate((*SPECIALS, *tokenizer.words))}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=SPECIALS[UNK]))
  library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(tokenizer.pattern), 'removed', invert=True)
  library.decoder = decoders.Fuse()
  library.add_special_tokens(list(SPECIALS))
  return library


def _beginning_with_bos(library: tokenizers.Tokenizer, tokenizer: Any) -> tokenizers.Tokenizer:
  """The same, beginning each text with bos, as the model was trained."""
  bos = library.id_to_token(tokenizer.bos_id)
  library.post_processor = processors.TemplateProcessing(single=f'{bos} $A', pair=f'{bos} $A {bos} $B',
                                                         special_tokens=[(bos, tokenizer.bos_id)])
  return library

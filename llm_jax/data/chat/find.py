"""Finds chat templates: built-in ones, Jinja files, and the folders of tokenizers and runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llm_jax.base.builder import known_names
from llm_jax.base.errors import ConfigError
from llm_jax.data.chat.template import FOLDER, Template

# The special tokens of the built-in templates: all, bos and eos; None: those of the tokenizer.
BUILTIN: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {
    'chatml': (('<|im_start|>', '<|im_end|>'), None, '<|im_end|>'),
    'llama3': (('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'), '<|begin_of_text|>',
               '<|eot_id|>'),
    'gemma': (('<bos>', '<start_of_turn>', '<end_of_turn>'), '<bos>', '<end_of_turn>'),
    'qwen3': (('<|im_start|>', '<|im_end|>'), None, '<|im_end|>'),
    'plain': ((), None, None),
}
TEMPLATE_FILE, TOKENIZER_CONFIG = 'chat_template.jinja', 'tokenizer_config.json'
DEFAULT = 'chatml'


def find_template(name: str | None, tokenizer: str, special_tokens: tuple[str, ...] = (),
                  field: str = 'config.data.chat.template') -> Template:
  """The template that the config names: a built-in one, a file, or the folder of a tokenizer or run.

  None: the one in the folder of `tokenizer`, if that is a file with a template beside it, else DEFAULT. Raises
  ConfigError.
  """
  if name is None:
    beside = Path(tokenizer).expanduser().parent
    name = str(beside) if tokenizer.endswith('.json') and folder_template(beside) is not None else DEFAULT
  if name in BUILTIN:
    tokens, bos_token, eos_token = BUILTIN[name]
    found = Template(name, (FOLDER / f'{name}.jinja').read_text(), tokens, bos_token, eos_token)
  else:
    found = _from_path(Path(name).expanduser(), name, field)
  more = [token for token in special_tokens if token not in found.special_tokens]
  return dataclasses.replace(found, special_tokens=(*found.special_tokens, *more))


def _from_path(path: Path, name: str, field: str) -> Template:
  legal = f'one of {", ".join(BUILTIN)}, a Jinja file, or a folder with {TEMPLATE_FILE} or {TOKENIZER_CONFIG}'
  if path.is_dir():
    found = folder_template(path)
    if found is None:
      raise ConfigError(f'{field}: the folder {name} has neither {TEMPLATE_FILE} nor a {TOKENIZER_CONFIG} with a '
                        f'chat_template; set {legal}')
    return found
  try:
    return Template(name, path.read_text(encoding='utf-8'))
  except (OSError, UnicodeDecodeError):
    hint = known_names(name, list(BUILTIN)) if not set(name) & set('./') else ''
    raise ConfigError(f'{field}: {name!r} cannot be read{"; " + hint if hint else ""}; set {legal}') from None


def folder_template(folder: Path) -> Template | None:
  """The template in a folder, with the special tokens of its tokenizer_config.json. Raises ConfigError."""
  values: dict[str, Any] = {}
  path = folder / TOKENIZER_CONFIG
  if path.is_file():
    try:
      values = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
      raise ConfigError(f'{path}: cannot be read: {e}') from None
    if not isinstance(values, dict):
      raise ConfigError(f'{path}: holds no JSON object')
  source = values.get('chat_template')
  if (folder / TEMPLATE_FILE).is_file():
    source = (folder / TEMPLATE_FILE).read_text(encoding='utf-8')
  if isinstance(source, list):  # several, by name
    source = next((entry['template'] for entry in source if entry.get('name') == 'default'), None)
  if source is None:
    return None
  if not isinstance(source, str):
    raise ConfigError(f'{path}: chat_template must be text; got {str(source)[:60]!r}')
  bos_token, eos_token = (_content(values.get(name)) for name in ('bos_token', 'eos_token'))
  added = [_content(token) for token in values.get('added_tokens_decoder', {}).values() if token.get('special')]
  extra = values.get('extra_special_tokens') or {}
  named = [*values.get('additional_special_tokens', ()), *(extra.values() if isinstance(extra, dict) else extra)]
  tokens = [token for token in (bos_token, eos_token, *added, *map(_content, named)) if token]
  return Template(str(folder), source, tuple(dict.fromkeys(tokens)), bos_token, eos_token)


def template_files(template: Template) -> dict[str, str]:
  """The files that `folder_template` and transformers read."""
  values = {'bos_token': template.bos_token, 'eos_token': template.eos_token,
            'additional_special_tokens': list(template.special_tokens)}
  return {TEMPLATE_FILE: template.source, TOKENIZER_CONFIG: json.dumps(values, indent=2, ensure_ascii=False) + '\n'}


def _content(token: Any) -> str | None:
  """The text of a token, which may be given as an object."""
  return token.get('content') if isinstance(token, dict) else token

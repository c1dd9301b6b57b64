"""Tokenizes the data of a run in advance: llm-jax data prepare --config=configs/gpt_small.py

Without a config, the fields of config.data are flags: --path='data/*.jsonl.gz' --field=text --tokenizer=bpe
"""

from __future__ import annotations

import argparse
import time
from typing import NoReturn

from llm_jax.base import plugins
from llm_jax.base.builder import build, override, parse_overrides
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.open import Data, open_data


def main(argv: list[str]) -> None:
  config, _ = parse(argparse.ArgumentParser(prog='llm-jax data prepare', allow_abbrev=False,
                                            description=__doc__), argv)
  begin = time.perf_counter()
  data = open_data(config)
  print(table(data))
  print(f'ready in {time.perf_counter() - begin:.1f} s, in {cache_dir(config)}; training will use these stores')


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[DataConfig, argparse.Namespace]:
  """(DataConfig from --config and --config.data.FIELD, or from --FIELD alone; the parser's own flags)."""
  parser.error = _refuse  # type: ignore[method-assign]
  parser.add_argument('--config', help='a config file, or the config.json of a run')
  parser.add_argument('--full_size', action='store_true', help='ignore the changes that the config makes on CPUs')
  plugins.add_flags(parser, trust=False)
  args, rest = parser.parse_known_args(argv)
  plugins.load_all(args.plugin)
  if args.config is not None:
    from llm_jax.config_file import open_config
    overrides = parse_overrides(rest, '--config.', '--config, --full_size, --plugin, --config.FIELD')
    return open_config(args.config).resolve(overrides, cpu_only=not args.full_size).data, args
  overrides = parse_overrides(rest, '--', '--config, --plugin, --FIELD of config.data, such as --path')
  values: dict = {'data': {}}
  override(values, {f'data.{name}': value for name, value in overrides.items()})
  config = build(DataConfig, values['data'], 'config.data')
  if 'path' not in overrides and not config.sources:
    raise ConfigError('--path: give a file, folder, glob or URL, or a --config')
  return config, args


def _refuse(message: str) -> NoReturn:
  """Raises ConfigError instead of argparse's usage message and exit code 2."""
  raise ConfigError(message)


def table(data: Data) -> str:
  """A table of documents, tokens and bytes for each split and source."""
  lines = [f'{"":24}{"documents":>12}{"tokens":>16}{"bytes of text":>16}{"bytes/token":>13}']
  for split, stores in data.splits.items():
    for name, store in stores.items():
      num_tokens = len(store.tokens)
      text = f'{"-":>16}{"-":>13}'
      if store.num_bytes:
        text = f'{store.num_bytes:16,.0f}{store.num_bytes / num_tokens:13.3f}'
      lines.append(f'{split + "/" + name:24.24}{len(store.starts):12,}{num_tokens:16,}{text}')
  encoder = data.encoder_tokenizer
  for_prompts = '' if encoder is None else f', {len(encoder.token_bytes):,} for prompts'
  return '\n'.join([*lines, f'vocabulary: {data.vocab_size:,} tokens{for_prompts}'])


if __name__ == '__main__':
  run_as_program(main)

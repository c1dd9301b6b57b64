"""Tokenizes the data of a config into the cache, so that training starts at once.

Without a config, the fields of config.data are flags. Data that take one machine too long are prepared in shards by
processes that share config.data.cache_dir, such as the tasks of a SLURM array or of an indexed Kubernetes job; each can
be started again. `llm-jax data merge`, or the training run, then merges them into the store of one process.

  llm-jax data prepare --config=gpt_small
  llm-jax data prepare --path='data/*.jsonl.gz' --field=text --tokenizer=bpe
  llm-jax data prepare --config=my_data.py --shard=$SLURM_ARRAY_TASK_ID/64
  llm-jax data prepare --config=my_data.py --dask=scheduler:8786 --num_shards=64
  zcat texts.gz | llm-jax data prepare - --tokenizer=byte
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from llm_jax.base import flags, plugins
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program, waiting

if TYPE_CHECKING:
  from llm_jax.data.config import DataConfig
  from llm_jax.data.open import Data


def parser() -> flags.Parser:
  parser = flags.Parser('data prepare', __doc__, fields='llm_jax.data.config:DataConfig')
  add_data(parser)
  parser.add_argument('--shard', metavar='INDEX/COUNT', help='prepare one shard only, as 0/8')
  parser.add_argument('--dask', metavar='ADDRESS', help='prepare on the workers of this Dask scheduler, and merge')
  parser.add_argument('--num_shards', type=int, metavar='N', help='for --dask; default: 4 for each worker')
  return parser


def main(argv: list[str]) -> None:
  config, args = parse(parser(), argv)
  from llm_jax.data.config import cache_dir
  from llm_jax.data.loaders import LOADERS
  if (args.shard and args.dask) or (args.num_shards is not None and not args.dask):
    raise ConfigError('--dask: makes all shards, --num_shards of them; --shard makes one without Dask')
  if args.shard:
    LOADERS['shards'].prepare(config, args.shard)
    return
  if args.dask:
    LOADERS['dask'](config, args.dask, args.num_shards, args.plugin)
  from llm_jax.data.open import open_data
  begin = time.perf_counter()
  waiting('reading data')
  data = open_data(config)
  for store in (store for stores in data.splits.values() for store in stores.values()):
    for file in getattr(store.tokens, 'files', ()):
      file.wait_for_checks()
  print(table(data))
  print(f'ready in {time.perf_counter() - begin:.1f} s, in {cache_dir(config)}; training will use these stores')


def add_data(parser: flags.Parser) -> None:
  """Adds --config, --full_size and --plugin."""
  flags.add_config(parser)
  plugins.add_flags(parser, trust=False)


def parse(parser: flags.Parser, argv: list[str]) -> tuple[DataConfig, argparse.Namespace]:
  """(DataConfig from --config and --config.data.FIELD, or from --FIELD alone; the parser's own flags)."""
  has_config = any(word.partition('=')[0] == '--config' for word in argv)
  parser.fields = 'llm_jax.config:Config' if has_config else parser.fields
  path = '--config.data.path=-' if has_config else '--path=-'
  args = parser.parse([path if word == '-' else word for word in argv], '--config.' if has_config else '--')
  plugins.load_all(args.plugin)
  if args.config is not None:
    from llm_jax.config_file import open_config
    return open_config(args.config).resolve(args.overrides, cpu_only=not args.full_size).data, args
  from llm_jax.base.builder import build, override
  from llm_jax.data.config import DataConfig
  values: dict = {'data': {}}
  given = {name.removeprefix('config.data.'): value for name, value in args.overrides.items()}
  try:
    override(values, {f'data.{name}': value for name, value in given.items()})
    config = build(DataConfig, values['data'], 'config.data')
  except ConfigError as e:  # fields are flags here
    raise ConfigError(str(e).replace('config.data.', '--')) from None
  if 'path' not in given and not config.sources:
    raise ConfigError('--path: give a file, folder, glob or URL, or a --config')
  return config, args


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

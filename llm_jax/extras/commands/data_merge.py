"""Merges the shards that `llm-jax data prepare --shard=INDEX/COUNT` wrote into the store that one process would write.

Give the same flags as there, without --shard. Token files are linked, not copied; the shards are removed.

  llm-jax data merge --config=gpt_small
"""

from __future__ import annotations

from llm_jax.base import flags
from llm_jax.base.process import run_as_program
from llm_jax.commands.data_prepare import add_data, parse


def parser() -> flags.Parser:
  parser = flags.Parser('data merge', __doc__, fields='llm_jax.data.config:DataConfig')
  add_data(parser)
  return parser


def main(argv: list[str]) -> None:
  config, _ = parse(parser(), argv)
  from llm_jax.extras.shards import merge
  merge(config)


if __name__ == '__main__':
  run_as_program(main)

"""Flags that all commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_jax.base import plugins, runtime


def add(parser: argparse.ArgumentParser, *, trust: bool = True) -> None:
  """Adds --tuning, --plugin, and --trust for commands with a --workdir."""
  parser.add_argument('--tuning', choices=('on', 'off'), default='on', help='off: do not change the C allocator and '
                      'the XLA flags (llm_jax/base/runtime.py lists the changes and their reasons)')
  plugins.add_flags(parser, trust=trust)


def apply(args: argparse.Namespace) -> str:
  """Prepares the process and runs the plug-ins, before anything imports JAX; returns a line on what was set."""
  was_set = runtime.prepare(args.tuning == 'on')
  plugins.load_all(args.plugin)
  if getattr(args, 'trust', False) and getattr(args, 'workdir', None) is not None:
    plugins.check_notes(Path(args.workdir), trust=True)
  return was_set

"""Flags that all commands share."""

from __future__ import annotations

import argparse

from llm_jax.base import plugins, runtime


def add(parser: argparse.ArgumentParser, *, trust: bool = True) -> None:
  """Adds --tuning, --plugin, and --trust for commands that read a run's folder."""
  runtime.add_flag(parser)
  plugins.add_flags(parser, trust=trust)


def apply(args: argparse.Namespace) -> str:
  """Prepares the process and runs the plug-ins, before anything imports JAX; returns a line on what was set."""
  was_set = runtime.prepare(args.tuning == 'on')
  plugins.load_all(args.plugin)
  return was_set

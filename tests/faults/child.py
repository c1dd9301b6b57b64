"""What a fork of the server runs."""

from __future__ import annotations


def llm_jax() -> None:
  """The command line, as the `llm-jax` script runs it."""
  from llm_jax.__main__ import run
  run()

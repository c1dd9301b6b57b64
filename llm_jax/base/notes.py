"""Lines about data and settings that are printed once in a process, however often they come up."""

from __future__ import annotations

import functools


@functools.cache
def print_once(line: str) -> None:
  print(line, flush=True)

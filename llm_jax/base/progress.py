"""One progress bar for everything long: live in a terminal, a plain line now and then elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


class _Lines:
  """A file for tqdm that puts each state of a bar on a line of its own, where no cursor can go back."""

  def write(self, text: str) -> None:
    if text.strip():
      print(text.strip(), file=sys.stderr)

  def flush(self) -> None:
    sys.stderr.flush()


def progress_bar(desc: str, total: float | None, unit: str, initial: float = 0) -> tqdm:
  """A bar on stderr that scales its unit (k, M, G) and shows rate and time left."""
  live = sys.stderr.isatty()
  options: dict[str, Any] = {} if live else {'file': _Lines(), 'mininterval': 10, 'ncols': 80, 'ascii': True}
  return tqdm(desc=desc, total=total, unit=unit, initial=initial, unit_scale=True, **options)

"""Progress bars: live in a terminal, plain lines every 10 seconds elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


class _Lines:
  """A file for tqdm that writes each state of a bar to a new line, for outputs without a cursor."""

  def write(self, text: str) -> None:
    if text.strip():
      print(text.strip(), file=sys.stderr)

  def flush(self) -> None:
    sys.stderr.flush()


def progress_bar(desc: str, total: float | None, unit: str, initial: float = 0) -> tqdm:
  """A bar on stderr with scaled units (k, M, G), rate and time left."""
  live = sys.stderr.isatty()
  options: dict[str, Any] = {} if live else {'file': _Lines(), 'mininterval': 10, 'ncols': 80, 'ascii': True}
  return tqdm(desc=desc, total=total, unit=unit, initial=initial, unit_scale=True, **options)

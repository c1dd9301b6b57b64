"""One progress bar for everything long: live in a terminal, a line now and then elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def progress(desc: str, total: float | None, unit: str, initial: float = 0) -> tqdm:
  """A tqdm bar on stderr that scales its unit (k, M, G) and shows rate and time left."""
  options: dict[str, Any] = {'mininterval': 0.2} if sys.stderr.isatty() else {'mininterval': 10, 'ncols': 100}
  return tqdm(desc=desc, total=total, unit=unit, initial=initial, unit_scale=True, **options)

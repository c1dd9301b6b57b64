"""Figures of matplotlib, an optional package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import write_file, writing


def load_pyplot(user: str) -> Any:
  """matplotlib.pyplot, which draws into files. Raises ConfigError that `user` needs it, if it is not installed."""
  try:
    import matplotlib
  except ImportError:
    raise ConfigError(f"{user} needs matplotlib: pip install 'llm_jax[plot]'") from None
  matplotlib.use('agg')
  from matplotlib import pyplot
  return pyplot


def write_picture(path: Path, figure: Any, dpi: int = 120) -> None:
  """Writes a figure in the format that the file's ending names. Raises StorageError."""
  picture = io.BytesIO()
  with writing(f'--out: {path}'):
    try:
      figure.savefig(picture, format=path.suffix.removeprefix('.') or 'png', dpi=dpi)
    except ValueError as e:  # an unknown format
      raise StorageError(f'--out: {path} cannot be written: {e}') from None
    write_file(path, picture.getvalue())

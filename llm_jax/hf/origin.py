"""Where a model came from: the published model from which a run was trained, and the license in its model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.base.storage import HUB, is_published
from llm_jax.config import Config
from llm_jax.hf.hub import cached

CARD = 'README.md'
FIELDS = ('license', 'license_name', 'license_link')  # of a card; the others say which license 'other' is
LONGEST = 2**16  # characters of a card that are read; its fields come first
MOST = 20  # runs, each of which began from the one before


class Origin(NamedTuple):
  """A published model."""

  name: str  # hf:org/name, or that of its folder
  license: dict[str, str]  # FIELDS of its model card
  is_found: bool  # whether its card could be looked for


def origin_of(config: Config, source: Path | None) -> Origin | None:
  """The published model from which the run in `source` was trained, also by way of other runs, or that is there itself.

  None for a model that was trained from scratch.
  """
  if source is not None and _is_model(_config_of(source)):
    return Origin(source.name, license_of(source), True)
  start = config.start.run
  for _ in range(MOST):
    if not start:
      return None
    folder = cached(start.removeprefix(HUB)) if is_published(start) else Path(start).expanduser()
    values = {} if folder is None else _config_of(folder)
    if folder is None or not values or _is_model(values):
      name = start if is_published(start) else Path(start).name
      return Origin(name, {} if folder is None else license_of(folder), bool(values))
    start = values.get('start', {}).get('run', '')
  return None


def license_of(folder: Path) -> dict[str, str]:
  """The fields of the license in the front matter of a folder's model card; empty without any."""
  try:
    with open(folder / CARD, encoding='utf-8', errors='replace') as f:
      text = f.read(LONGEST)
  except OSError:
    return {}
  front = re.match(r'---\s*\n(.*?)\n---', text, re.DOTALL)
  found = dict[str, str]()
  for name in FIELDS:
    # A value on its line, quoted or not, or the first entry of a list below.
    match = re.search(rf'^{name}:[ \t]*(?:\n[ \t]*-[ \t]*)?([^\n#]+)', front[1] if front else '', re.MULTILINE)
    if match and (value := match[1].strip().strip('\'"[] ')) and value.isprintable():
      found[name] = value[:200]
  return found


def _config_of(folder: Path) -> dict[str, Any]:
  try:
    values = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return values if isinstance(values, dict) else {}


def _is_model(values: dict[str, Any]) -> bool:
  """Whether it is the config of a published model."""
  return 'model_type' in values

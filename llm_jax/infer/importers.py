"""The registry of importers, which read models that other programs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_jax.base.registry import Registry

# Classes with `owns(folder)`, whether they read this folder; `model_values(folder)`, the values of a model section;
# `tokenizer(folder)`, the value of data.tokenizer; `open(folder, flag)` -> load.Opened; `read(run, folder, mesh)` ->
# load.Loaded; and `check(folder, when)`, which compares the model with the program that wrote it; `when` is one of
# auto, always and never.
IMPORTERS = Registry('importer')


def importer_of(folder: Path) -> Any:
  """The importer that reads a folder; None for a run or an exported model of this package."""
  if (folder / 'checkpoints').exists() or not (folder / 'config.json').is_file():
    return None
  return next((IMPORTERS[name] for name in IMPORTERS if IMPORTERS[name].owns(folder)), None)

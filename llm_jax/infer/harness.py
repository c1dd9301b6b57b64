"""Harnesses: packages that evaluate a run on tasks of their own; by name, for `llm-jax evaluate --tasks`."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_jax.base.registry import Registry


@dataclasses.dataclass(frozen=True)
class TaskOptions:
  """What to evaluate."""

  tasks: tuple[str, ...]
  include_path: str = ''  # a folder with the user's own tasks
  num_fewshot: int | None = None  # examples before each question; None: each task's own
  limit: int | None = None  # documents of each task; None: all


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """The results of a harness."""

  results: dict[str, dict[str, float]]  # by task and metric
  table: str  # the same for people
  details: dict[str, Any]  # anything else that belongs in the JSON file: versions, numbers of documents


# HARNESSES[name](trained, options) -> TaskReport; `trained` is an infer.trained.Trained. Raises UserErrors.
HARNESSES = Registry('harness')

"""The Python API, for notebooks and scripts: load configs, train, and use trained runs.

  config = llm_jax.load_config('configs/gpt_small.py', **{'optim.learning_rate': 3e-4})
  training = llm_jax.train(config, 'runs/mine')
  for metrics in training:
    print(metrics['step'], metrics.get('train/loss'))
  print(training.generate('def '))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import optax

from llm_jax import config as config_lib
from llm_jax import config_file
from llm_jax.base import plugins
from llm_jax.base.devices import only_cpus
from llm_jax.base.errors import ConfigError
from llm_jax.base.storage import open_workdir, read_workdir
from llm_jax.config import Config
from llm_jax.data import given
from llm_jax.infer.mesh import loaded_on_mesh
from llm_jax.infer.trained import Trained, export_results
from llm_jax.losses.function import LossFunction
from llm_jax.training import loop
from llm_jax.training.custom import Custom, as_callbacks
from llm_jax.training.ending import workdir_line
from llm_jax.training.event import Event
from llm_jax.training.status import read_status

Callback = Callable[[Event], Any]


def load_config(path: str | Path, *, full_size: bool = False, **overrides: Any) -> Config:
  """Loads a Config from a file or a run's config.json, with `overrides` by path ('optim.learning_rate': 3e-4).

  Without an accelerator the file's on_cpu is applied, unless `full_size`. Raises ConfigError with all problems.
  """
  return config_file.open_config(path).resolve(overrides, cpu_only=only_cpus() and not full_size)


class Training:
  """A run that trains while it is iterated over; each iteration yields the 'step' and metrics of a logged step.

  Methods may be called between two iterations. After a break, iterating again resumes from the last checkpoint.
  """

  def __init__(self, config: Config, workdir: str | Path, custom: Custom):
    self.config, self._custom = config, custom
    self.workdir, self._storage = open_workdir(workdir, config.checkpoint)
    self._event: Event | None = None

  def __iter__(self) -> Iterator[dict[str, float]]:
    try:
      with self._storage:
        for event in loop.train(self.config, self.workdir, self._custom):
          self._event = event
          yield {'step': event.step, **event.metrics}
    finally:
      self._event = None

  def validate(self) -> dict[str, float]:
    """Evaluates the current weights: {'val/loss': ...}. Raises ConfigError if the training is not running."""
    return self._now().validate()

  def save(self) -> None:
    """Writes a checkpoint now and waits until it is complete on disk."""
    self._now().save()

  def generate(self, prompt: str = '', **options: Any) -> str:
    """Trained.generate with the current weights, or with the last checkpoint if the training is not running."""
    if self._event is not None:
      return Trained(self._event.read(), self.workdir).generate(prompt, **options)
    return load(self.workdir, model=self._custom.model).generate(prompt, **options)

  def status(self) -> dict[str, Any]:
    """The contents of status.json: state, step, best, metrics (throughput, memory, ...), seconds_left, ..."""
    return read_status(self.workdir) if self._event is None else self._event.status()

  def export_results(self, path: str | Path) -> None:
    """Writes the config, the status and all metrics as one JSON file. Raises StorageError."""
    export_results(self.workdir, Path(path))

  def _now(self) -> Event:
    if self._event is None:
      raise ConfigError('the training is not running: call this between two iterations, or use llm_jax.load(...) for a '
                        'finished run')
    return self._event


def train(config: Config, workdir: str | Path = 'runs/run', *, model: nn.Module | None = None,
          tx: optax.GradientTransformation | None = None, loss: LossFunction | None = None, data: Any = None,
          callbacks: Iterable[Callback] | Callback = ()) -> Training:
  """A run in `workdir` that starts, or resumes, when it is iterated over.

  Arguments replace parts of the config; None keeps them. `model`: a Flax module that maps tokens [B, T] to logits
  [B, T, V] (an NNX module through flax.nnx.bridge.to_linen). `tx`: an Optax transformation. `loss`: a function
  (logits [B, T, V], batch) -> (losses, weights), both [B, T]. `data`: an iterable or Grain dataset of texts, of dicts
  with `text` and optionally `answer` or `label`, or of batches with `tokens` and `targets` [B, T]. `callbacks`:
  functions called with the Event of each logged step. Raises UserErrors.
  """
  custom = Custom(model, tx, loss, callbacks=as_callbacks(callbacks), summary=(workdir_line(workdir),))
  if data is not None:
    holds_batches, data = given.inspect(data)
    if holds_batches:
      return Training(config, workdir, dataclasses.replace(custom, batches=given.GivenBatches(data)))
    config = config_lib.replace(config, data=dataclasses.replace(
        config.data, **given.write_documents(data, open_workdir(workdir, config.checkpoint)[0])))
  return Training(config, workdir, custom)


def load(workdir: str | Path, checkpoint: str | int = 'latest', *, model: nn.Module | None = None,
         loss: LossFunction | None = None, plugin: Iterable[str] = (), trust: bool = False, mesh: str = '') -> Trained:
  """Loads the run in `workdir` at 'latest', 'best' or a step.

  `model` and `loss` are those passed to `train`, `plugin` the plug-ins (files or modules) of the run; with `trust` the
  copies in the folder are executed. `mesh` is like 'fsdp=4,tensor=2'; without it one is chosen on which the weights
  fit. Raises UserErrors (see base/errors.py).
  """
  plugins.load_all(plugin)
  folder = read_workdir(workdir, str(checkpoint))
  with loaded_on_mesh(folder, str(checkpoint), mesh, trust=trust, module=model) as run:
    return Trained(run, folder, Custom(loss=loss).loss_terms)

"""The same as the command line, for notebooks and scripts.

  config = llm_jax.load_config('configs/gpt_small.py', **{'optim.learning_rate': 3e-4})
  training = llm_jax.train(config, 'runs/mine')
  for metrics in training:
    print(metrics['step'], metrics.get('train/loss'))
  print(training.generate('def '))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax import loop, sampling
from llm_jax.assemble import Run, load_run, make_evaluator, own_data, prompt_ids
from llm_jax.config import Config
from llm_jax.data.tokenizers import before_eos, decode
from llm_jax.devices import only_cpus
from llm_jax.errors import ConfigError, StorageError
from llm_jax.metrics import read_metrics
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.status import read_status


def load_config(path: str | Path, *, full_size: bool = False, **overrides: Any) -> Config:
  """The Config of a file, or of a run's config.json, with `overrides` by path ('optim.learning_rate': 3e-4).

  Without an accelerator it is what the file has for CPUs, unless `full_size`. Raises ConfigError, all problems at once.
  """
  return config_lib.load(path).resolve(overrides, cpu_only=only_cpus() and not full_size)


class Training:
  """A run that goes on as it is iterated: each round gives the metrics of a step that is logged, and its 'step'.

  Between two rounds it can be asked; breaking off and iterating again goes on from the last checkpoint.
  """

  def __init__(self, config: Config, workdir: str | Path):
    self.config, self.workdir = config, Path(workdir)
    self._moment: loop.Moment | None = None

  def __iter__(self) -> Iterator[dict[str, float]]:
    try:
      for moment in loop.moments(self.config, self.workdir):
        self._moment = moment
        yield {'step': moment.step, **moment.metrics}
    finally:  # what it could be asked with is closed
      self._moment = None

  def validate(self) -> dict[str, float]:
    """'val/loss' and so on, with the weights that it has now. Raises ConfigError if it is not under way."""
    return self._now().validate()

  def save(self) -> None:
    """Writes a checkpoint now, and waits until it is durable."""
    self._now().save()

  def generate(self, prompt: str = '', **options: Any) -> str:
    """See Trained.generate; by the last checkpoint, if it is not under way."""
    trained = load(self.workdir) if self._moment is None else Trained(self._moment.read(), self.workdir)
    return trained.generate(prompt, **options)

  def status(self) -> dict[str, Any]:
    """What status.json says: state, step, best, metrics (throughput, memory, ...), seconds_left, ..."""
    return read_status(self.workdir)

  def export_results(self, path: str | Path) -> None:
    """Writes the config, the status and all metrics as one JSON file. Raises StorageError."""
    export_results(self.workdir, Path(path))

  def _now(self) -> loop.Moment:
    if self._moment is None:
      raise ConfigError('the training is not under way: ask between two rounds, or llm_jax.load(...) what is finished')
    return self._moment


class Trained:
  """A trained run, read from its workdir."""

  def __init__(self, run: Run, workdir: Path):
    self.run, self.workdir, self.config = run, workdir, run.config

  def validate(self, split: str = 'val') -> dict[str, float]:
    """The losses and metrics of a part of the run's data, all of it."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
      data = own_data(self.run)
      stores = data.splits.get(split)
      if not stores:
        raise ConfigError(f'split: the run has no {split} part; it has {", ".join(data.splits)}')
      return make_evaluator(self.config, data, self.run.model, mesh)(self.run.params, stores, None)[0]

  def generate(self, prompt: str = '', *, num_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
               top_p: float = 1.0, seed: int = 0) -> str:
    """What follows the prompt. Raises ConfigError where the run knows no text or the prompt is too long."""
    run = self.run
    if run.tokenizer is None or run.prompt_tokenizer is None or not run.config.writes:
      raise ConfigError(f'{self.workdir} has not learnt to write text')
    [ids] = prompt_ids(run.config, run.prompt_tokenizer, [prompt])
    if len(ids) > run.config.model.longest_prompt:
      raise ConfigError(f'prompt: {len(ids)} tokens, and {run.config.model.longest_prompt} are the most')
    columns = sampling.generate(
        run.model, run.params, [ids], max_len=run.config.model.max_len, num_tokens=num_tokens, seed=seed,
        temperature=temperature, top_k=top_k, top_p=top_p, num_ids=len(run.tokenizer.token_bytes))
    row = [int(column[0]) for column in columns]
    return decode(run.tokenizer, before_eos(run.tokenizer, row))

  def status(self) -> dict[str, Any]:
    return read_status(self.workdir)

  def export_results(self, path: str | Path) -> None:
    """See Training.export_results."""
    export_results(self.workdir, Path(path))


def train(config: Config, workdir: str | Path = 'runs/run') -> Training:
  """A run in `workdir`, not begun yet: iterate over it. What the folder holds is gone on with."""
  return Training(config, workdir)


def load(workdir: str | Path, checkpoint: str = 'latest') -> Trained:
  """The run in `workdir` at 'latest', 'best' or a step. Raises UserErrors (see errors.py)."""
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    return Trained(load_run(Path(workdir), mesh, checkpoint), Path(workdir))


def export_results(workdir: Path, path: Path) -> None:
  results: dict[str, Any] = {'workdir': str(workdir), 'status': read_status(workdir)}
  for name in ('config', 'evaluation'):
    if (workdir / f'{name}.json').is_file():
      results[name] = json.loads((workdir / f'{name}.json').read_text())
  if (workdir / 'metrics.jsonl').is_file():
    results['metrics'] = read_metrics(workdir / 'metrics.jsonl')
  try:
    path.write_text(json.dumps(results, indent=2, default=lambda x: np.asarray(x).tolist()))
  except OSError as e:
    raise StorageError(f'{path} cannot be written: {e.strerror}') from None

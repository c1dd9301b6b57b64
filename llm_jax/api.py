"""The same as the command line, for notebooks and scripts.

  config = llm_jax.load_config('configs/gpt_small.py', **{'optim.learning_rate': 3e-4})
  training = llm_jax.train(config, 'runs/mine')
  for metrics in training:
    print(metrics['step'], metrics.get('train/loss'))
  print(training.generate('def '))
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax import config as config_lib
from llm_jax.base.devices import only_cpus
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.config import Config
from llm_jax.data.open import tokenize
from llm_jax.data.tokenizers.tokenizer import before_eos, decode
from llm_jax.infer import sampling
from llm_jax.infer.answers import Answer, summarize_answers
from llm_jax.infer.load import Run, answer_stores, load_run, make_evaluator, own_data, prompt_ids, renamed_labels
from llm_jax.infer.validators import make_validator
from llm_jax.training import loop
from llm_jax.training.log import read_metrics
from llm_jax.training.resolve import check_classes
from llm_jax.training.status import read_status


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
    return read_status(self.workdir) if self._moment is None else self._moment.status()

  def export_results(self, path: str | Path) -> None:
    """Writes the config, the status and all metrics as one JSON file. Raises StorageError."""
    export_results(self.workdir, Path(path))

  def _now(self) -> loop.Moment:
    if self._moment is None:
      raise ConfigError('the training is not under way: ask between two rounds, or llm_jax.load(...) what is finished')
    return self._moment


class Evaluation(NamedTuple):
  """What an evaluation finds: {'loss': ...}, counts of what was taken for what, and the answers to prompts."""

  results: dict[str, float]
  tables: dict[str, np.ndarray]
  answers: list[Answer]


class Trained:
  """A trained run, read from its workdir."""

  def __init__(self, run: Run, workdir: Path):
    self.run, self.workdir, self.config = run, workdir, run.config

  def validate(self, split: str = 'val') -> dict[str, float]:
    """The losses and metrics of a part of the run's data, all of it."""
    return self.evaluate(split, num_answers=0).results

  def evaluate(self, split: str = 'val', data: str | None = None, *, num_answers: int | None = None,
               num_beams: int | None = None, validator: str | None = None) -> Evaluation:
    """Of a part of the run's data, or of all that `data` names (file, folder, glob, .bin); None: as in its config.

    Where it learnt answers it gives `num_answers`, or all. Raises ConfigError, DataError.
    """
    run, own = self.run, self.config.eval
    if split not in ('train', 'val', 'test'):
      raise ConfigError(f'--split: {split!r} is none of train, val, test')
    validator = own.validator if validator is None else validator
    num_beams = own.num_beams if num_beams is None else num_beams
    if (num_answers or 0) < 0 or num_beams < 1:
      raise ConfigError(f'--answers must not be negative, --num_beams at least 1; got {num_answers}, {num_beams}')
    make_validator(validator)  # told now, not after the whole loss
    config = dataclasses.replace(
        self.config, eval=dataclasses.replace(own, answers=0, validator=validator, num_beams=num_beams))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
      opened = own_data(run) if data is None else renamed_labels(
          tokenize(data, config.data, run.tokenizer, run.encoder_tokenizer), config.loss.classification.classes)
      check_classes(config, opened)
      if opened.vocab_size > config.model.vocab_size:
        raise ConfigError(f"--data: token {opened.vocab_size - 1} is outside the model's vocabulary of "
                          f'{config.model.vocab_size}')
      stores = opened.splits.get(split if data is None else 'val')
      if not stores:
        raise ConfigError(f'--split: the run has no {split} part; it is set by config.data.{split}_fraction, '
                          f'{split}_documents or {split}_path')
      results, tables = make_evaluator(config, opened, run.model, mesh)(run.params, stores, None)
      if not config.answers or run.tokenizer is None or num_answers == 0:
        return Evaluation(results, tables, [])
      answers = answer_stores(config, opened, run.model, run.params, stores, num_answers)
      return Evaluation(results | summarize_answers(answers), tables, answers)

  def generate(self, prompt: str = '', *, num_tokens: int = 128, **options: Any) -> str:
    """What follows the prompt; `options` are those of `tokens`. Raises ConfigError."""
    columns, tokenizer = self.tokens(prompt, num_tokens=num_tokens, **options), self.run.tokenizer
    assert tokenizer is not None  # `tokens` has asked for one
    return decode(tokenizer, before_eos(tokenizer, [int(column[0]) for column in columns]))

  def tokens(self, prompt: str = '', *, num_samples: int = 1, num_tokens: int = 128, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, num_beams: int = 0, seed: int = 0) -> Iterable[np.ndarray]:
    """int32 [num_samples]: the next token of each sample, one after the other; of a beam search the best alone.

    Raises ConfigError where the run knows no text, the prompt is too long, or an option cannot be.
    """
    for bad, message in ((num_samples < 1, f'--num_samples must be at least 1; got {num_samples}'),
                         (num_tokens < 1, f'--num_tokens must be at least 1; got {num_tokens}'),
                         (temperature < 0, f'--temperature must not be negative; got {temperature}'),
                         (num_beams < 0, f'--num_beams must not be negative; got {num_beams}'),
                         (num_beams and num_samples > 1, '--num_beams finds one text; leave out --num_samples'),
                         (top_k < 0, f'--top_k must not be negative; got {top_k}'),
                         (not 0 < top_p <= 1, f'--top_p must lie in (0, 1]; got {top_p}')):
      if bad:
        raise ConfigError(message)
    run, config = self.run, self.config
    if run.tokenizer is None or run.prompt_tokenizer is None:
      raise ConfigError(f'--workdir: {self.workdir} was trained on ids without a tokenizer, so there is no text to '
                        'read or write')
    if not config.writes:
      raise ConfigError(f'--workdir: {self.workdir} has not learnt to write (config.data.task={config.data.task}, '
                        f'config.loss.terms={", ".join(config.loss.terms)}); see llm-jax predict')
    [ids] = prompt_ids(config, run.prompt_tokenizer, [prompt])
    if len(ids) > config.model.longest_prompt:
      raise ConfigError(f'--prompt: {len(ids)} tokens, and {config.model.longest_prompt} are the most that the model '
                        'was made for; shorten it')
    options = {'max_len': config.model.max_len, 'num_tokens': num_tokens, 'num_ids': len(run.tokenizer.token_bytes)}
    if num_beams:
      return sampling.beam_search(run.model, run.params, [ids], eos_id=run.tokenizer.eos_id, num_beams=num_beams,
                                  **options).T
    return sampling.generate(run.model, run.params, [ids] * num_samples, seed=seed, temperature=temperature,
                             top_k=top_k, top_p=top_p, **options)

  def status(self) -> dict[str, Any]:
    return read_status(self.workdir)

  def export_results(self, path: str | Path) -> None:
    """See Training.export_results."""
    export_results(self.workdir, Path(path))


def train(config: Config, workdir: str | Path = 'runs/run') -> Training:
  """A run in `workdir`, not begun yet: iterate over it. A folder that holds a run resumes it."""
  return Training(config, workdir)


def load(workdir: str | Path, checkpoint: str | int = 'latest') -> Trained:
  """The run in `workdir` at 'latest', 'best' or a step. Raises UserErrors (see errors.py)."""
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    return Trained(load_run(Path(workdir), mesh, str(checkpoint)), Path(workdir))


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

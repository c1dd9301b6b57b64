"""Trained: a loaded run, for evaluation and generation."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.errors import ConfigError, UserError
from llm_jax.base.files import write_file, writing
from llm_jax.base.multihost import in_turn
from llm_jax.base.sharding import use_mesh
from llm_jax.data.chat.template import Messages
from llm_jax.data.open import Data, tokenize
from llm_jax.data.tokenizers.tokenizer import before_eos, decode
from llm_jax.infer import sampling
from llm_jax.infer.answers import Answer, answer_metrics, answer_stores, summarize_answers
from llm_jax.infer.load import Loaded, open_run, own_data, read_run
from llm_jax.infer.mesh import on_mesh
from llm_jax.infer.options import check_options
from llm_jax.infer.score import make_evaluator
from llm_jax.infer.text import check_writes, fit_prompt
from llm_jax.infer.validators import make_validator
from llm_jax.losses.config import make_objective
from llm_jax.losses.metrics import make_metrics
from llm_jax.training.log import read_metrics
from llm_jax.training.resolve import check_labels
from llm_jax.training.status import read_status


class Evaluation(NamedTuple):
  """Results of an evaluation such as {'loss': ...}, confusion counts, and answers to prompts."""

  results: dict[str, float]
  tables: dict[str, np.ndarray]
  answers: list[Answer]


class Trained:
  """A run loaded from its folder. It computes on `mesh`, that of its parameters, whatever mesh is in use."""

  def __init__(self, run: Loaded, workdir: Path, loss_terms: dict[str, Any] | None = None, mesh: Mesh | None = None):
    self.run, self.workdir, self.config, self._loss_terms = run, workdir, run.config, loss_terms
    self.mesh = run.mesh if mesh is None else mesh

  @functools.cached_property
  def _variables(self) -> Any:
    with self.on_mesh():
      return sampling.decode_variables(self.run.model, self.run.params)

  def on_mesh(self) -> AbstractContextManager[None]:
    """Programs that are traced inside are sharded as the parameters are."""
    return use_mesh(self.mesh, self.config.mesh)

  def for_generation(self) -> Trained:
    """The same run, which can only generate: it does not hold the weights in the form that evaluation needs.

    Generation needs each layer in arrays of its own, so a Trained that does both holds the layers twice.
    """
    generator = Trained(dataclasses.replace(self.run, params=None), self.workdir, self._loss_terms, self.mesh)
    generator._variables = self._variables
    return generator

  def validate(self, split: str = 'val') -> dict[str, float]:
    """The losses and metrics on a whole split of the run's data."""
    return self.evaluate(split, num_answers=0).results

  def evaluate(self, split: str = 'val', data: str | None = None, *, num_answers: int | None = None,
               num_beams: int | None = None, validator: str | None = None) -> Evaluation:
    """Evaluates on a split of the run's data, or on all of `data` (a file, folder, glob or .bin).

    A run trained on answers generates `num_answers` of them; None: all. Raises ConfigError, DataError.
    """
    run, own = self.run, self.config.eval
    if run.params is None:
      raise ConfigError('this run was loaded for generation only; evaluate one that llm_jax.load returns')
    if split not in ('train', 'val', 'test'):
      raise ConfigError(f'--split: must be train, val or test; got {split!r}')
    if not self.config.answers and (num_answers or validator or num_beams):
      raise ConfigError('--answers, --num_beams and --validator are for runs that learned answers to prompts')
    validator = own.validator if validator is None else validator
    num_beams = own.num_beams if num_beams is None else num_beams
    if num_beams < 1:
      raise ConfigError(f'--num_beams: must be at least 1; got {num_beams}')
    if (num_answers or 0) < 0:
      raise ConfigError(f'--answers: must not be negative; got {num_answers}')
    answers_due = self.config.answers and run.tokenizer is not None and num_answers != 0
    if answers_due:
      make_validator(validator), answer_metrics(own)  # to report an error before the loss is computed
    # every=0: no evaluation chooses a checkpoint here, so the names of results are not checked against each other.
    config = dataclasses.replace(self.config, eval=dataclasses.replace(
        own, every=0, patience=0, capabilities=(), goal='', answers=0, validator=validator, num_beams=num_beams))
    with self.on_mesh():
      opened = in_turn(lambda: self._open(split, data))
      stores = opened.splits[split if data is None else 'val']
      objective = make_objective(config.loss, given=self._loss_terms, metrics=make_metrics(own.metrics, own.sections))
      results, tables = make_evaluator(config, opened, run.model, objective, self.mesh)(run.params, stores, None)
      if not answers_due:
        return Evaluation(results, tables, [])
      answers = answer_stores(config, opened, run.model, run.params, stores, num_answers)
      return Evaluation(results | summarize_answers(answers, own), tables, answers)

  def _open(self, split: str, data: str | None) -> Data:
    """Opens the data to evaluate on. Raises ConfigError, DataError if the model cannot read them."""
    run, config = self.run, self.config
    if data is None:
      opened = own_data(run)
    else:
      try:
        opened = tokenize(data, config.data, run.tokenizer, run.encoder_tokenizer)
      except UserError as e:
        raise type(e)(str(e).replace('config.data.path', '--data')) from None
      for name in config.loss.terms:
        opened = config.loss.sections[name].relabel(opened)
    check_labels(config, opened)
    if opened.vocab_size > config.model.vocab_size:
      raise ConfigError(f"--data: token {opened.vocab_size - 1} is outside the model's vocabulary of "
                        f'{config.model.vocab_size}')
    if not opened.splits.get(split if data is None else 'val'):
      raise ConfigError(f'--split: the run has no {split} part, as none of config.data.{split}_fraction, '
                        f'{split}_documents and {split}_path was set; set another split')
    return opened

  def generate(self, prompt: str | Messages = '', *, num_tokens: int = 128, **options: Any) -> str:
    """The text that follows the prompt; `options` are those of `tokens`. Raises ConfigError."""
    columns, tokenizer = self.tokens(prompt, num_tokens=num_tokens, **options), self.run.tokenizer
    assert tokenizer is not None  # checked by `tokens`
    return decode(tokenizer, before_eos(tokenizer, [int(column[0]) for column in columns]))

  def tokens(self, prompt: str | Messages = '', *, num_samples: int = 1, num_tokens: int = 128,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, num_beams: int = 0,
             seed: int = 0) -> Iterable[np.ndarray]:
    """Iterates over columns int32 [num_samples], the next token of each sample; beam search gives one sample.

    With a chat template a text is a message of the user; messages are (role, content), the user's last. Of another
    prompt that is longer than the context, the end is continued, and a line on stderr says so. Raises ConfigError if
    the run cannot write text, has learned to answer only whole prompts and this one is too long, or an option is
    invalid.
    """
    check_options({'num_samples': num_samples, 'num_tokens': num_tokens, 'temperature': temperature, 'top_k': top_k,
                   'top_p': top_p, 'num_beams': num_beams, 'seed': seed})
    run, config = self.run, self.config
    reader = check_writes(config, run.prompt_tokenizer, self.workdir)
    ids, note = fit_prompt(config, reader, prompt, num_tokens)
    if note and jax.process_index() == 0:
      print(note, file=sys.stderr, flush=True)
    assert run.tokenizer is not None  # as there is one of prompts
    num_ids = len(run.tokenizer.token_bytes)
    options = {'max_len': config.model.max_len, 'num_tokens': num_tokens, 'num_ids': num_ids,
               'variables': self._variables}
    if num_beams:
      with self.on_mesh():
        return sampling.beam_search(run.model, run.params, [ids], eos_id=run.tokenizer.eos_id, num_beams=num_beams,
                                    **options).T
    return each_within(self.on_mesh, sampling.generate(
        run.model, run.params, [ids] * num_samples, seed=seed, temperature=temperature, top_k=min(top_k, num_ids),
        top_p=top_p, **options))

  def status(self) -> dict[str, Any]:
    return read_status(self.workdir)

  def export_results(self, path: str | Path) -> None:
    """Writes config, status, evaluation and all metrics as one JSON file. Raises StorageError."""
    export_results(self.workdir, Path(path))


def each_within(context: Callable[[], AbstractContextManager], columns: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
  """The columns, each computed within context(), which does not hold while the caller has one."""
  while True:
    with context():
      column = next(columns, None)
    if column is None:
      return
    yield column


def load_writer(workdir: Path, checkpoint: str, mesh: str = '', *, trust: bool, prompt: str | Messages = '',
                num_tokens: int = 1) -> Trained:
  """A run for generation, beginning with `prompt`; what is wrong is reported before the weights are read.

  `mesh` is that of the flag --mesh. Raises UserErrors.
  """
  run = open_run(workdir, trust=trust)
  fit_prompt(run.config, check_writes(run.config, run.prompt_tokenizer, workdir), prompt, num_tokens)
  with on_mesh(run, mesh) as devices:
    return Trained(read_run(run, workdir, devices, checkpoint), workdir).for_generation()


def export_results(workdir: Path, path: Path) -> None:
  """Writes config, status, evaluation and all metrics of a run as one JSON file. Raises StorageError."""
  results: dict[str, Any] = {'workdir': str(workdir), 'status': read_status(workdir)}
  for name in ('config', 'evaluation'):
    if (workdir / f'{name}.json').is_file():
      results[name] = json.loads((workdir / f'{name}.json').read_text())
  if (workdir / 'metrics.jsonl').is_file():
    results['metrics'] = read_metrics(workdir / 'metrics.jsonl')
  with writing(str(path)):
    write_file(path, json.dumps(results, indent=2, default=lambda x: np.asarray(x).tolist()))

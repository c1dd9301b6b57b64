"""From config and data to model, evaluation and samples: what train, evaluate and generate share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Params, as_batch
from llm_jax.base.errors import ConfigError, DataError, Interrupted, StorageError
from llm_jax.base.sharding import local_rows, num_batch_shards, put_batch
from llm_jax.config import Config, build, renamed
from llm_jax.data import pipeline
from llm_jax.data.open import Data, data_fingerprint, open_data, task_of
from llm_jax.data.rows.examples import Examples
from llm_jax.data.stores.store import TokenStore
from llm_jax.data.tokenizers.tokenizer import Tokenizer, before_eos, decode, load_tokenizer
from llm_jax.infer import export as packed
from llm_jax.infer import sampling
from llm_jax.infer.answers import Answer, answer, summarize_answers
from llm_jax.infer.score import evaluate
from llm_jax.infer.validators import make_validator
from llm_jax.losses.config import make_objective
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import make_optimizer
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.stages import at_step
from llm_jax.training.state import abstract_state, eval_step, param_info, param_shardings, state_shardings


def renamed_labels(data: Data, classes: tuple[str, ...] | None) -> Data:
  """Data from elsewhere, its labels as numbers of these classes. Raises DataError for a class that is none of them."""
  def renamed(store: TokenStore) -> TokenStore:
    if not classes or store.labels is None or not store.classes:  # numbers are the classes' own
      return store
    if unknown := set(store.classes) - set(classes):
      raise DataError(f'--data: {", ".join(sorted(unknown))} are no classes of the run; known: {", ".join(classes)}')
    numbers = np.array([classes.index(name) for name in store.classes], np.float64)
    return dataclasses.replace(store, labels=numbers[np.asarray(store.labels).astype(int)], classes=classes)

  return dataclasses.replace(data, splits={split: {name: renamed(store) for name, store in stores.items()}
                                           for split, stores in data.splits.items()})


def build_model(config: Config) -> Any:
  """The model of a completed config, with the heads that its losses need."""
  objective = make_objective(config.loss)
  return make_model(config.model, objective.heads, objective.num_weights)


def load_teacher(config: Config, data: Data, mesh: Mesh) -> Run | None:
  """The run that a distillation learns from. Raises UserErrors where there is none, or it cannot read our rows."""
  if 'distillation' not in config.loss.terms:
    return None
  settings = config.loss.distillation
  path = 'config.loss.distillation.teacher'
  try:
    teacher = load_run(Path(settings.teacher).expanduser(), mesh, settings.checkpoint)
  except StorageError as e:
    raise ConfigError(str(e).replace('--workdir', path)) from None
  except ConfigError as e:
    raise ConfigError(str(e).replace('--checkpoint', 'config.loss.distillation.checkpoint')) from None
  ours, theirs = tokenizers_of(data), tokenizers_of(teacher)
  if ours != theirs or (config.model.vocab_size != teacher.config.model.vocab_size):
    with_encoder = ' (and encoder_tokenizer its encoder_tokenizer.json)' if ours[1:] != theirs[1:] else ''
    raise ConfigError(f'{path}: {settings.teacher} was trained with another tokenizer, or another vocabulary; give '
                      f'config.data.tokenizer its tokenizer.json{with_encoder}, and config.model.vocab_size '
                      f'{teacher.config.model.vocab_size}')
  if missing := teacher.model.needs - ({'encoder_tokens'} if task_of(config.data).encodes else set()):
    raise ConfigError(f'{path}: {settings.teacher} needs {", ".join(sorted(missing))}, which config.data.task='
                      f'{config.data.task} does not give')
  if teacher.config.model.max_len < config.data.seq_len:
    raise ConfigError(f'{path}: {settings.teacher} reads rows of {teacher.config.model.max_len} tokens at most, and '
                      f'config.data.seq_len is {config.data.seq_len}')
  return teacher


def tokenizers_of(source: Data | Run) -> list[str | None]:
  """Its tokenizer and that of its prompts, as they are compared."""
  return [None if t is None else t.to_json() for t in (source.tokenizer, source.prompt_tokenizer)]


def gather(value: Any) -> list:
  """The JSON values of all processes, in their order."""
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
  texts = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text)), constant_values=ord(' ')))
  return [json.loads(bytes(row)) for row in texts.reshape(-1, longest)]


def example_batch(config: Config) -> Batch:
  """One row, for its shapes."""
  blank = jnp.zeros((1, config.data.seq_len), jnp.int32)
  read = jnp.zeros((1, config.data.encoder_len), jnp.int32) if task_of(config.data).encodes else None
  return Batch(tokens=blank, targets=blank, loss_mask=blank.astype(jnp.float32), encoder_tokens=read)


def abstract_batch(examples: Examples, num_rows: int) -> Batch:
  """A Batch of `num_rows` rows of the examples' shapes and types."""
  row = examples.make(0, np.random.default_rng(0))
  return as_batch({name: jax.ShapeDtypeStruct((num_rows, *x.shape), x.dtype) for name, x in row.items()})


def make_evaluator(config: Config, data: Data, model: Any, mesh: Mesh) -> Callable[..., tuple[dict, dict]]:
  """evaluator(params, stores, max_tokens, interrupted): a fixed pass over stores, compiled once.

  It returns ({'loss': ...}, what Objective.tables gives).

  Of several stores each has its own 'NAME/loss' too, and an equal part of `max_tokens`. It raises Interrupted as soon
  as interrupted() is true.
  """
  lengths = [len(b) for b in data.tokenizer.token_bytes] if data.tokenizer else []
  token_bytes = np.zeros(model.cfg.vocab_size, np.int32)
  token_bytes[:len(lengths)] = lengths
  judge = make_objective(config.loss).judge()
  eval_fn = jax.jit(partial(eval_step, model=model, token_bytes=jnp.asarray(token_bytes), objective=judge))
  num_rows = num_eval_rows(config, num_batch_shards(mesh))
  rows = local_rows(mesh, num_rows)

  def evaluator(params: Params, stores: dict[str, TokenStore], max_tokens: int | None,
                interrupted: Callable[[], bool] = lambda: False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    def batches(store: TokenStore) -> Iterator[Batch]:
      max_rows = max_tokens and max(1, max_tokens // config.data.seq_len // len(stores))
      examples = pipeline.open_examples(config.data, data, store, train=False)
      for features in pipeline.eval_batches(examples, num_rows, rows, max_rows):
        if interrupted():
          raise Interrupted
        yield put_batch(features, rows, num_rows, mesh)

    sums = {name: evaluate(eval_fn, params, batches(store)) for name, store in stores.items()}
    for name, store in stores.items():
      if 'next_token/bytes' in sums[name]:
        sums[name]['next_token/bytes'] *= store.bytes_scale
    whole = {key: sum(s[key] for s in sums.values()) for key in next(iter(sums.values()))}
    results = judge.summarize(whole)
    if config.eval.answers:
      results |= summarize_answers(answer_stores(config, data, model, params, stores, config.eval.answers, interrupted))
    if len(stores) > 1:
      results |= {f'{name}/{key}': value for name in stores for key, value in judge.summarize(sums[name]).items()
                  if key in ('loss', 'bits_per_byte')}
    return results, judge.tables(whole)

  return evaluator


def num_eval_rows(config: Config, num_shards: int) -> int:
  """Rows of a batch of an evaluation."""
  if not make_objective(config.loss).row_wise:  # as many are compared as in training
    return config.rows_per_batch
  return num_shards * ((config.tokens_per_device or config.data.seq_len) // config.data.seq_len)


def answer_stores(config: Config, data: Data, model: Any, params: Params, stores: dict[str, TokenStore],
                  limit: int | None, interrupted: Callable[[], bool] = lambda: False) -> list[Answer]:
  """Answers to the pairs of all stores, of each an equal part of `limit` rows."""
  validator = make_validator(config.eval.validator)
  answers: list[Answer] = []
  for store in stores.values():
    examples = pipeline.open_examples(config.data, data, store, train=False)
    assert data.tokenizer is not None  # `complete` has asked for one
    answers += answer(model, params, examples, data.tokenizer, num_beams=config.eval.num_beams, validator=validator,
                      limit=limit and max(1, limit // len(stores)), interrupted=interrupted,
                      prompt_tokenizer=data.encoder_tokenizer)
  return answers


def prompt_ids(config: Config, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
  """What the model reads of each text: as in training, bos before it, or in an encoder eos behind it."""
  encodes = task_of(config.data).encodes
  return [[*map(int, ids), tokenizer.eos_id] if encodes else [tokenizer.bos_id, *map(int, ids)]
          for ids in tokenizer.encode(texts)]


def encode_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
  """The ids of config.eval.prompts. Raises ConfigError for one that has no ids or leaves no room for an answer."""
  try:
    prompts = prompt_ids(config, tokenizer, list(config.eval.prompts))
  except DataError as e:
    raise ConfigError(f'config.eval.prompts: {e}; set others, for example --config.eval.prompts=') from None
  for prompt, ids in zip(config.eval.prompts, prompts, strict=True):
    if len(ids) > config.model.longest_prompt:
      raise ConfigError(f'config.eval.prompts: {prompt!r} is {len(ids)} tokens, and {config.model.longest_prompt} are '
                        'the most; shorten it')
  return prompts


def samples(config: Config, data: Data, model: Any, params: Params) -> list[tuple[str, str]]:
  """(prompt, it and what the model makes of it) for each prompt of config.eval; none where ids have no text."""
  tokenizer, reader = data.tokenizer, data.prompt_tokenizer
  if tokenizer is None or reader is None or not config.eval.sample_tokens or not config.writes:
    return []
  prompts = encode_prompts(config, reader)
  columns = sampling.generate(
      model, params, prompts, max_len=config.model.max_len, num_tokens=config.eval.sample_tokens, seed=config.seed,
      temperature=config.eval.temperature, top_k=config.eval.top_k,
      num_ids=len(tokenizer.token_bytes))
  texts = []
  for row in np.stack(list(columns), axis=1).tolist():
    texts.append(decode(tokenizer, before_eos(tokenizer, row)))
  between = '' if model.prompt_in_row else '\n'
  return [(prompt, prompt + between + text) for prompt, text in zip(config.eval.prompts, texts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, read back from its workdir."""

  config: Config
  tokenizer: Tokenizer | None
  model: Any
  params: Params  # averaged ones, if the optimizer has them
  meta: dict  # of the checkpoint: step, data fingerprint, ...
  encoder_tokenizer: Tokenizer | None = None  # of the prompts of pairs; None: tokenizer reads them too

  @property
  def prompt_tokenizer(self) -> Tokenizer | None:
    return self.tokenizer if self.encoder_tokenizer is None else self.encoder_tokenizer


def own_data(run: Run) -> Data:
  """The data of a run. Raises DataError if it is no longer what it was trained on."""
  data = open_data(run.config.data)
  fingerprint = data_fingerprint(run.config.data, data, 0, 0)
  if any(fingerprint.get(name) != run.meta['data'].get(name) for name in ('train_tokens', 'encoder_tokenizer')):
    raise DataError(f'config.data.path: {run.config.data.path} is no longer what the run was trained on, so its '
                    'validation part cannot be told; name a file: --data=FILE')
  return data


def load_run(workdir: Path, mesh: Mesh, checkpoint: str = 'latest') -> Run:
  """The run in `workdir` at 'latest', 'best' or a step. Nothing there is executed. Raises UserErrors."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise StorageError(f'--workdir: {workdir} holds no run (no config.json)')
  try:
    config = build(Config, renamed(json.loads(path.read_text())))
  except (ValueError, ConfigError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  tokenizer = load_tokenizer(workdir / 'tokenizer.json') if (workdir / 'tokenizer.json').exists() else None
  encoder_tokenizer = None
  if config.data.encoder_tokenizer is not None:
    encoder_tokenizer = load_tokenizer(workdir / 'encoder_tokenizer.json')
  model = build_model(config)
  example = example_batch(config)
  if (workdir / packed.FILE).is_file():  # an exported model
    leaves, lies = param_shardings(example, mesh, model=model)
    leaves = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), leaves, lies)
    return Run(config, tokenizer, model, *packed.read_params(workdir / packed.FILE, leaves), encoder_tokenizer)
  tx = make_optimizer(config.optim, config.num_steps, param_info(example, model=model))
  shardings = state_shardings(example, mesh, model=model, tx=tx)
  abstract = abstract_state(example, shardings, model=model, tx=tx)
  if not (workdir / 'checkpoints').is_dir():
    raise StorageError(f'--workdir: {workdir} has no checkpoints yet')
  with Checkpoints(workdir / 'checkpoints', config.checkpoint, read_only=True) as checkpoints:
    if not checkpoints.steps():
      raise StorageError(f'--workdir: {workdir} has no checkpoints yet')
    step = checkpoints.named(checkpoint, '--checkpoint')
    params, kept, meta = checkpoints.restore(
        abstract.params, (abstract.step, abstract.opt_state) if tx.averages else None,
        step=step)
  if tx.averages:
    params = jax.jit(tx.evaluated, out_shardings=shardings.params)(kept[1], params)
  return Run(at_step(config, meta['step']), tokenizer, model, params, meta, encoder_tokenizer)

"""Compares a model folder here and in transformers: ids of texts, logits, and a greedy continuation."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh

from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.hf.folder import HuggingFace, with_dtype
from llm_jax.hf.ternary import KINDS
from llm_jax.infer import sampling

NUM_ROWS, LENGTH, NUM_NEW = 2, 64, 32
LARGEST = 1e-4  # of the largest logit
# The same where inputs of matrices are rounded to 8 bits: an input that lies between two codes can get either, and the
# differences grow from layer to layer.
LARGEST_ROUNDED = 0.05
TEXTS = ('The quick brown fox, 3.14 times!', '  two  spaces\n\tand a tab\n', 'caf\u00e9 \u4e2d\u6587 \U0001f600', 'x')


class MismatchError(UserError):
  """A model that computes something else in transformers than here."""

  exit_code = 70


class Agreement(NamedTuple):
  largest: float  # difference of two logits, as a share of the largest logit
  num_equal: int  # tokens of the greedy continuation that are equal, of NUM_NEW

  def __str__(self) -> str:
    return (f'agrees with transformers: largest difference of logits {self.largest:.1e} of the largest logit, '
            f'{self.num_equal} greedy tokens equal')


def can_check(*more: str) -> bool:
  """Whether transformers and PyTorch are installed, and other packages."""
  return all(importlib.util.find_spec(name) is not None for name in ('torch', 'transformers', *more))


def fits_in_memory(folder: Path) -> bool:
  """Whether both copies in float32 fit: at most 4 bytes for each of the 2 that a parameter has in the files, twice."""
  size = sum(path.stat().st_size for path in folder.glob('*.safetensors'))
  return 4 * size < psutil.virtual_memory().available


def check_folder(folder: Path, mesh: Mesh, seed: int = 0, where: str = '--check') -> Agreement:
  """Raises MismatchError if the folder's model differs in transformers, ConfigError if it cannot be loaded there.

  `where` names the flag or field for messages.
  """
  if not can_check():
    raise ConfigError(f'{where}: compares with transformers, which needs torch and transformers: pip install torch '
                      'transformers; or leave it out')
  run = with_dtype(HuggingFace.open(folder, where), 'float32')
  loaded = HuggingFace.read(run, folder, mesh)
  theirs = _open(folder)
  _check_ids(folder, run.tokenizer)
  cfg = run.config.model
  length = max(1, min(LENGTH, (cfg.max_len or LENGTH) - NUM_NEW))
  tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (NUM_ROWS, length)).astype(np.int32)
  batch = Batch(tokens=jnp.asarray(tokens), targets=jnp.asarray(tokens), loss_mask=jnp.ones(tokens.shape))
  model = loaded.model
  mine = np.asarray(jax.jit(lambda params: model.apply({'params': params}, batch))(loaded.params))[..., :cfg.vocab_size]
  others = theirs.logits(tokens)
  largest = float(np.abs(mine - others).max() / max(np.abs(others).max(), 1e-30))
  rounded = getattr(cfg, 'einsum', '') in KINDS
  allowed = LARGEST_ROUNDED if rounded else LARGEST
  if not largest <= allowed:  # also for NaN
    raise MismatchError(f'{folder}: logits differ from those of transformers by up to {largest:.2e} of the largest '
                        f'logit; at most {allowed:g} is allowed')
  num_new = min(NUM_NEW, (cfg.max_len or NUM_NEW) - length)
  prompt = tokens[0].tolist()
  columns = list(sampling.generate(model, loaded.params, [prompt], max_len=cfg.max_len, num_tokens=num_new, seed=0,
                                   temperature=0.0, num_ids=cfg.vocab_size))
  own, other = [int(column[0]) for column in columns], theirs.continuation(prompt, num_new)
  equal = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), num_new)
  if equal < num_new and not rounded and not _tied(theirs, [*prompt, *own[:equal]], own[equal], other[equal]):
    raise MismatchError(f'{folder}: greedy tokens differ from those of transformers after {equal} equal ones: here '
                        f'{own[equal]}, there {other[equal]}')
  return Agreement(largest, equal)


def _tied(theirs: Any, ids: list[int], token: int, other: int) -> bool:
  """Whether two next tokens are as likely as rounding can tell."""
  logits = theirs.logits(np.array([ids]))[0, -1]
  return bool(abs(logits[token] - logits[other]) <= LARGEST * np.abs(logits).max())


class _Theirs:
  """The model in transformers, on the CPU in float32."""

  def __init__(self, model: Any):
    self.model = model

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    import torch
    with torch.no_grad():
      return self.model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()

  def continuation(self, prompt: list[int], num_new: int) -> list[int]:
    import torch
    ids, past, found = torch.tensor([prompt]), None, []
    with torch.no_grad(), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # names of arguments that change between versions
      for _ in range(num_new):
        out = self.model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(int(ids))
    return found


def _open(folder: Path) -> _Theirs:
  import torch
  import transformers
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  try:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                              attn_implementation='eager')
  except Exception as e:  # transformers raises many types
    raise ConfigError(f'{folder}: transformers cannot load it: {type(e).__name__}: {e}') from None
  return _Theirs(model.eval())


def _check_ids(folder: Path, tokenizer: Any) -> None:
  """Compares the ids of texts, without special tokens. Raises MismatchError."""
  if tokenizer is None or not (folder / 'tokenizer.json').is_file():
    return
  import transformers
  try:
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  except Exception as e:
    raise ConfigError(f'{folder}: transformers cannot load the tokenizer: {type(e).__name__}: {e}') from None
  for text in TEXTS:
    try:
      mine = [int(i) for i in tokenizer.encode([text])[0]]
    except UserError:
      continue  # a character that the tokenizer lacks
    if (other := theirs(text, add_special_tokens=False)['input_ids']) != mine:
      raise MismatchError(f'{folder}: the ids of {text!r} differ in transformers: {other[:12]}, here {mine[:12]}')

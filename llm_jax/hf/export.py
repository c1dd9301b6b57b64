"""Writes a model as a folder that transformers loads: config, weights, tokenizer, generation config and model card."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta

from llm_jax.base.errors import ConfigError
from llm_jax.base.files import write_file, writing
from llm_jax.base.multihost import barrier, is_first
from llm_jax.base.progress import Progress
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import by_name
from llm_jax.data.pipeline import example_batch
from llm_jax.data.tokenizers.tokenizer import stop_ids
from llm_jax.hf.card import model_card
from llm_jax.hf.check import can_check, check_folder
from llm_jax.hf.family import FAMILIES, choose_family, rules_to_write, with_biases
from llm_jax.hf.hub import push
from llm_jax.hf.ternary import KINDS
from llm_jax.hf.tokenizer import tokenizer_files
from llm_jax.hf.weights import tensors_of, write_weights
from llm_jax.infer.export import FOLDER_FORMATS
from llm_jax.infer.load import Loaded
from llm_jax.infer.tensor_file import Entry
from llm_jax.models.registry import make_model
from llm_jax.training.shardings import boxed_params

UNITS = {'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12}


class HuggingFaceFormat:
  """The export format `hf`."""

  @staticmethod
  def write(run: Loaded, args: Any) -> list[str]:
    """Writes args.out by the flags of the command export. Raises UserErrors."""
    max_shard = parse_size(args.max_shard or '5GB')
    needs = ('accelerate',) if getattr(run.config.model, 'einsum', '') in KINDS else ()
    if args.check == 'always' and not can_check(*needs):
      names = ('torch', 'transformers', *needs)
      raise ConfigError(f'--check: compares with transformers, which needs {", ".join(names)}: pip install '
                        f'{" ".join(names)}; or leave it out')
    lines = [f'{args.out}: ' + write_model(
        run, args.out, source=args.workdir, dtype=args.dtype or 'float32', max_shard=max_shard, family=args.family,
        license_name=args.license or '', check=args.check != 'never' and can_check())]
    if args.push and is_first():
      lines.append(push(args.out, args.push))
    return lines


def parse_size(text: str) -> int:
  """'5GB' as bytes. Raises ConfigError."""
  match = re.fullmatch(r'(\d+(?:\.\d+)?) ?([KMGT]B)', text.strip(), re.IGNORECASE)
  if not match or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
    raise ConfigError(f'--max_shard: must be a size such as 500MB or 5GB; got {text!r}')
  return size


def write_model(run: Loaded, folder: Path, *, source: Path | None = None, dtype: str = 'float32',
                max_shard: int = 5 * 10**9, family: str | None = None, license_name: str = '',
                check: bool = False, where: str = '--out') -> str:
  """Writes the run's model and returns what it is. `folder` must be new; all processes call this together.

  `source` is the run's folder, for the model card. With `check` it is compared with transformers. `where` names
  the flag or field for messages. Raises ConfigError for a model or tokenizer that transformers does not have,
  StorageError, and MismatchError; then there is no folder.
  """
  writes = jax.process_index() == 0
  model_type, values = choose_family(run.config.model, family)
  params, cfg = _with_zeros(run, model_type)
  files = {} if run.tokenizer is None else tokenizer_files(run.tokenizer, cfg.max_len)
  ids, found = _special_ids(run), ''
  # torch_dtype is the field's name for transformers 4, dtype for 5.
  config = values | ids | {'torch_dtype': dtype, 'dtype': dtype}
  tensors = list(tensors_of(params, rules_to_write(cfg, model_type), cfg.num_layers, cfg.vocab_size, dtype))
  precision = ('1.58 bits, other tensors in ' if any(spec.dtype == np.uint8 for _, spec, _ in tensors) else '') + dtype
  aside = folder.with_name(f'{folder.name}.partial')
  with writing(f'{where}: {folder}'):
    if writes:
      shutil.rmtree(aside, ignore_errors=True)
      aside.mkdir(parents=True)
      write_file(aside / 'config.json', json.dumps(config, indent=2) + '\n')
      write_file(aside / 'generation_config.json', json.dumps(
          {name: value for name, value in ids.items() if value is not None}, indent=2) + '\n')
      for name, content in files.items():
        write_file(aside / name, content)
    with Progress(f'writing {folder}', total=len(tensors), unit='tensors', shown=writes) as progress:
      def counted(make: Any) -> Any:
        def call() -> Any:
          progress.update(1)
          return make()
        return call

      total = write_weights(aside, [(name, spec, counted(make)) for name, spec, make in tensors], max_shard,
                            writes=writes)
    if writes:
      model_card(aside, run, source, model_type, _num_params(tensors), precision, license_name, folder.name)
      found = 'not compared with transformers'
      if check and getattr(cfg, 'einsum', '') in KINDS and not can_check('accelerate'):
        found += ', whose BitNet needs the package accelerate'
      elif check:
        found = _checked(aside)
      if folder.exists():
        folder.rmdir()  # an empty one
      aside.rename(folder)
  barrier(f'export to {folder}')
  return f'{FAMILIES[model_type].architecture}, {len(tensors)} tensors, {total:,} bytes in {precision}; {found}'


def _num_params(tensors: list[Entry]) -> int:
  """Parameters in tensors, of which a byte holds four."""
  return sum(math.prod(spec.shape) * (4 if spec.dtype == np.uint8 else 1) for _, spec, _ in tensors)


def _checked(folder: Path) -> str:
  """The result of the comparison; removes a folder that differs. Raises UserErrors."""
  mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])  # as one process does it alone
  try:
    with jax.set_mesh(mesh):
      return str(check_folder(folder, mesh))
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _with_zeros(run: Loaded, model_type: str) -> tuple[dict[str, Any], Any]:
  """(the parameters by path, the config), with biases of 0 where the family has some and the model has none."""
  params, cfg, other = by_name(run.params), run.config.model, with_biases(run.config.model)
  held = {path for rule in rules_to_write(cfg, model_type) for path in rule.paths}
  if held == set(params) or other is cfg:
    return params, cfg
  like = by_name(meta.unbox(boxed_params(example_batch(run.config.data), model=make_model(other))))
  zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in like.items() if path not in params}
  return params | zeros, other


def _special_ids(run: Loaded) -> dict[str, Any]:
  """bos, eos and pad; all None without a tokenizer, as transformers has numbers of its own as defaults."""
  if run.tokenizer is None:
    return dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  base = getattr(run.tokenizer, 'base', run.tokenizer)
  ends = sorted(stop_ids(run.tokenizer))
  return {'bos_token_id': run.tokenizer.bos_id, 'eos_token_id': ends[0] if len(ends) == 1 else ends,
          'pad_token_id': base.eos_id}


register(FOLDER_FORMATS, 'hf', HuggingFaceFormat, NoSettings)

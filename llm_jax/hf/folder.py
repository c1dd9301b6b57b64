"""Reads a folder of a published model, as transformers writes it: config.json, *.safetensors and the tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh

from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.multihost import say
from llm_jax.base.progress import Progress
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import path_of
from llm_jax.config import Config
from llm_jax.data.chat.find import TOKENIZER_CONFIG, folder_template
from llm_jax.data.chat.template import Template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.config import DataConfig
from llm_jax.data.pipeline import example_batch
from llm_jax.data.tokenizers.bpe_files import VOCAB, is_vocab
from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from llm_jax.hf.family import Family, read_model
from llm_jax.hf.ternary import as_trained
from llm_jax.hf.weights import Tensors, check_tensors, check_tied, read_weights
from llm_jax.infer.importers import IMPORTERS
from llm_jax.infer.load import Loaded, Opened
from llm_jax.models.registry import make_model
from llm_jax.training.shardings import abstract_params, boxed_params

ROW = 1024  # tokens of the rows on which such a model is evaluated, if it reads as many


class HuggingFace:
  """The importer `huggingface`."""

  @staticmethod
  def owns(folder: Path) -> bool:
    try:
      values = json.loads((folder / 'config.json').read_text())
    except (OSError, ValueError, RecursionError):
      return False
    return isinstance(values, dict) and 'model_type' in values

  @staticmethod
  def model_values(folder: Path) -> dict[str, Any]:
    return to_dict(as_trained(_model(folder)[1]))

  @staticmethod
  def tokenizer(folder: Path) -> str:
    paths = [folder / name for name in ('tokenizer.json', VOCAB, 'tokenizer.model')]
    return next((str(path) for path in paths if path.is_file() and (path.name != VOCAB or is_vocab(path))), 'none')

  @staticmethod
  def open(folder: Path, flag: str) -> Opened:
    _, model = _model(folder)
    name = HuggingFace.tokenizer(folder)
    seq_len = min(ROW, model.max_len or ROW)
    config = Config(model=model, batch_tokens=seq_len, tokens_per_device=seq_len,
                    data=DataConfig(path='', tokenizer=name, seq_len=seq_len))
    return Opened(config, None if name == 'none' else _tokenizer(folder, name, model.vocab_size), None)

  @staticmethod
  def read(run: Opened, folder: Path, mesh: Mesh) -> Loaded:
    family, _ = _model(folder)
    model = make_model(run.config.model)
    abstract = abstract_params(boxed_params(example_batch(run.config.data), model=model), mesh)
    cfg, tensors = run.config.model, Tensors(folder)
    rules = family.rules(cfg)
    names = check_tensors(tensors, rules, cfg.num_layers, family.prefix)
    check_tied(tensors, cfg, names)
    with Progress(f'reading {folder}', total=len(names), unit='tensors') as progress:
      arrays = read_weights(tensors, rules, names, abstract, cfg.num_layers, cfg.vocab_size,
                            lambda: progress.update(1))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: arrays[path_of(path)], abstract)
    return Loaded(run.config, run.tokenizer, None, model, params, {'step': 0, 'data': {}})

  @staticmethod
  def check(folder: Path, when: str) -> None:
    """Compares the folder with transformers, on process 0. Raises UserErrors."""
    from llm_jax.hf.check import can_check, check_folder, fits_in_memory
    if when == 'never' or jax.process_index():
      return
    if when == 'auto' and not (can_check() and fits_in_memory(folder)):
      why = 'it does not fit in memory' if can_check() else 'torch or transformers is not installed'
      say(f'{folder}: not compared with transformers, as {why}')
      return
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
      say(f'{folder}: {check_folder(folder, mesh, where="config.start.check")}')


def _model(folder: Path) -> tuple[Family, Any]:
  path = folder / 'config.json'
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  return read_model(values, str(path))


def _tokenizer(folder: Path, name: str, vocab_size: int) -> Tokenizer:
  """The folder's tokenizer, with its chat template and the ids that end a text. Raises ConfigError, DataError."""
  tokenizer = open_tokenizer(name)
  if isinstance(tokenizer, HuggingFaceTokenizer):
    tokenizer.leads = tokenizer.begins_with_bos()
  elif name.endswith('.model'):
    cast(Any, tokenizer).leads = bool(_json(folder / TOKENIZER_CONFIG).get('add_bos_token', True))
  template = folder_template(folder)
  whole: Any = tokenizer if template is None else _with_template(folder, name, tokenizer, template, vocab_size)
  whole.other_ends = _ends(folder)
  return whole


def _ends(folder: Path) -> list[int]:
  """eos_token_id of generation_config.json, or else of config.json: one or several. Raises StorageError."""
  for name in ('generation_config.json', 'config.json'):
    found = _json(folder / name).get('eos_token_id')
    ends = [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    if ends:
      return ends
  return []


def _json(path: Path) -> dict[str, Any]:
  """The object in a file; empty without the file. Raises StorageError."""
  try:
    values = json.loads(path.read_text()) if path.is_file() else {}
  except (OSError, ValueError, RecursionError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  if not isinstance(values, dict):
    raise StorageError(f'{path}: damaged: it must hold an object')
  return values


def _with_template(folder: Path, name: str, tokenizer: Tokenizer, template: Template, vocab_size: int) -> ChatTokenizer:
  """Raises ConfigError, DataError."""
  chat = ChatTokenizer(tokenizer, template)
  if chat.added and len(chat.token_bytes) > vocab_size:
    raise ConfigError(f'{folder}: the chat template needs the tokens {", ".join(chat.added[:5])}, which '
                      f'{name} does not have as special tokens; save the tokenizer as tokenizer.json by transformers')
  return chat


def with_dtype(run: Opened, dtype: str) -> Opened:
  """The run with another dtype of matrix operands."""
  return dataclasses.replace(run, config=dataclasses.replace(
      run.config, model=dataclasses.replace(run.config.model, dtype=dtype)))


register(IMPORTERS, 'huggingface', HuggingFace, NoSettings)


"""What a run says of itself as it begins, the files that repeat it, and its losses in other units."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np

from llm_jax.config import Config, to_dict
from llm_jax.data.open import Data
from llm_jax.data.sources.fetch import shown
from llm_jax.layers.attention import describe_attention
from llm_jax.training.log import Console
from llm_jax.training.state import TrainState


def text_metrics(split: str, loss: float | None, data: Data, task: str) -> dict[str, float]:
  """Perplexity, and bits per byte by the split's mean bytes per token, of nats a token."""
  if loss is None:
    return {}
  values = {f'{split}/perplexity': float(np.exp(min(loss, 700.0)))}
  stores = data.train.values()
  if task == 'next_token' and stores and all(store.num_bytes for store in stores):
    num_tokens, num_bytes = sum(len(s.tokens) for s in stores), sum(s.num_bytes for s in stores)
    values[f'{split}/bits_per_byte'] = loss / np.log(2) * num_tokens / num_bytes
  return values


def write_run_files(config: Config, data: Data, workdir: Path) -> None:
  """config.json, which repeats the run, and its tokenizers, without which its tokens mean nothing."""
  if jax.process_index() != 0:
    return
  files = {'config.json': json.dumps(to_dict(config), indent=2)}
  for name, tokenizer in (('tokenizer', data.tokenizer), ('encoder_tokenizer', data.encoder_tokenizer)):
    if tokenizer is not None:
      files[f'{name}.json'] = tokenizer.to_json()
  for name, content in files.items():
    aside = workdir / f'{name}.partial'
    aside.write_text(content)
    os.replace(aside, workdir / name)


def describe(config: Config, data: Data, state: TrainState, num_microbatches: int, held_rows: int, workdir: Path,
             console: Console) -> None:
  devices, seq_len = jax.devices(), config.data.seq_len
  num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  num_train, num_val = (sum(len(store.tokens) for store in side.values()) for side in (data.train, data.val))
  amount = 'a stream' if config.data.streaming else f'{num_train / 1e6:.2f} M tokens'
  epochs = config.num_steps * config.batch_tokens / max(1, num_train)
  console.line(f'devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es), '
               f'mesh {dict(jax.sharding.get_abstract_mesh().shape)}')
  console.line(f'model: {config.model.name}, {num_params / 1e6:.2f} M parameters, {config.model.num_layers} layers, '
               f'{config.model.embed_dim} wide, vocabulary {config.model.vocab_size}, {config.model.dtype}')
  console.line('attention: ' + describe_attention(
      config.model.attention, config.model.dtype, config.model.H, config.model.positions_of(seq_len),
      segments=config.data.mask_documents, prefix=config.model.prefix_attention))
  console.line(f'data: {", ".join(shown(s.path) for s in config.data.named_sources.values())}: {amount} to train '
               f'on, {num_val / 1e6:.2f} M to validate with'
               + (f'; {config.num_steps} steps are {epochs:.2f} epochs' if num_train else ''))
  console.line(f'batch: {config.batch_tokens} tokens = {num_microbatches} microbatch(es) x {held_rows} row(s) '
               f'x {seq_len} tokens on each of {config.rows_per_batch // num_microbatches // held_rows} device(s)')
  console.line(f'workdir: {workdir}; watch it: tensorboard --logdir {workdir}')

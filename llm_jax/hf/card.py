"""The model card of an exported model: README.md with config, data, results, the curve of the loss, and how to load."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from llm_jax.base.builder import to_dict
from llm_jax.base.errors import UserError
from llm_jax.base.files import write_file
from llm_jax.base.redaction import public
from llm_jax.base.storage import HUB
from llm_jax.hf.origin import Origin, origin_of
from llm_jax.infer.load import Loaded
from llm_jax.training.log import read_metrics

BARS = '\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588'
POINTS = 60  # of the curve


def model_card(folder: Path, run: Loaded, source: Path | None, model_type: str, num_params: int, precision: str,
               license_name: str, title: str) -> None:
  """Writes README.md. Raises OSError."""
  front: dict[str, Any] = {'library_name': 'transformers', 'pipeline_tag': 'text-generation',
                           'tags': ['llm_jax', model_type]}
  origin = origin_of(run.config, source)
  front |= {'license': license_name} if license_name else {} if origin is None else origin.license
  if origin is not None and origin.name.startswith(HUB):
    front['base_model'] = origin.name.removeprefix(HUB).partition('@')[0]
  data = public(to_dict(run.config))['data']
  sources = {name: source['path'] for name, source in (data.get('sources') or {'data': data}).items() if source['path']}
  lines = ['---', *(f'{name}: {json.dumps(value)}' for name, value in front.items()), '---', '', f'# {title}', '',
           f'A {model_type} model with {num_params:,} parameters in {precision}, '
           + (f'trained up to step {run.meta["step"]:,} with' if run.meta['step'] else 'written by')
           + f' llm_jax {importlib.metadata.version("llm_jax")}.', '']
  lines += _rights(origin, license_name)
  lines += ['## Load', '', '```python', 'from transformers import AutoModelForCausalLM, AutoTokenizer', '',
            f"model = AutoModelForCausalLM.from_pretrained('{title}')"]
  if run.tokenizer is not None:
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained('{title}')")
  lines += ['```', '']
  if sources:
    lines += ['## Data', '', *(f'- {name}: `{path}`' for name, path in sources.items()), '']
  lines += _results(source)
  config = {name: value for name, value in public(to_dict(run.config))['model'].items() if value is not None}
  lines += ['## Model', '', '| Field | Value |', '|---|---|',
            *(f'| {name} | {value} |' for name, value in config.items()), '']
  write_file(folder / 'README.md', '\n'.join(lines))


def _rights(origin: Origin | None, license_name: str) -> list[str]:
  """Lines on the model that it was made from and on its license."""
  if origin is None:
    return [] if license_name else ['No license was named for it (`llm-jax export --license=...`).', '']
  line = f'It was made from the published model `{origin.name.removeprefix(HUB)}`'
  if license_name:
    return [f'{line}.', '']
  if origin.license:
    return [f'{line}, whose license it has.', '']
  why = 'names no license' if origin.is_found else 'could not be read'
  return [f'{line}, whose model card {why}; see there for its terms (`llm-jax export --license=...` names a license).',
          '']


def _results(source: Path | None) -> list[str]:
  """The newest results of the run and the curve of its loss; empty for a model without a run."""
  if source is None or not (source / 'metrics.jsonl').is_file():
    return []
  try:
    rows = read_metrics(source / 'metrics.jsonl')
  except (UserError, OSError, json.JSONDecodeError):
    return []
  last: dict[str, tuple[int, float]] = {}
  for row in rows:
    last |= {name: (int(row['step']), value) for name, value in row.items()
             if name.startswith(('train/loss', 'val/', 'test/')) and isinstance(value, int | float)}
  losses = [row['train/loss'] for row in rows if isinstance(row.get('train/loss'), int | float)]
  lines = list[str]()
  if last:
    lines += ['## Results', '', '| Result | Step | Value |', '|---|---|---|',
              *(f'| {name} | {step:,} | {value:.4f} |' for name, (step, value) in sorted(last.items())), '']
  if losses:
    lines += [f'Training loss, from {losses[0]:.3f} to {losses[-1]:.3f}:', '', f'`{curve(losses)}`', '']
  return lines


def curve(values: list[float]) -> str:
  """Values as a row of bars of eight heights, at most POINTS of them, each the mean of a part."""
  size = max(1, -(-len(values) // POINTS))
  means = [sum(part) / len(part) for part in (values[i:i + size] for i in range(0, len(values), size))]
  low, high = min(means), max(means)
  return ''.join(BARS[min(7, int(8 * (value - low) / (high - low or 1)))] for value in means)

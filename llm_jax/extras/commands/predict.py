"""Predicts classes, numbers or embeddings of texts, and prints one JSON object per text, in order.

It has the most likely classes for classification, the numbers for regression, the embedding for contrastive runs (as
the first text of a pair). Without --text, each line of stdin is a text.

  llm-jax predict runs/package --text='def sleep(delay):' --top=3
  llm-jax predict runs/package < functions.txt
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program, waiting

if TYPE_CHECKING:
  import numpy as np

ROWS = 32  # texts per batch


def parser() -> flags.Parser:
  parser = flags.Parser('predict', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser)
  parser.add_argument('--text', action='append', help='may be repeated (default: the lines of stdin)')
  parser.add_argument('--top', type=int, default=5, help='number of classes to print')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  if args.top < 1:
    raise ConfigError(f'--top must be at least 1; got {args.top}')

  flags.apply(args)
  import jax

  from llm_jax.base.multihost import from_first, is_first
  from llm_jax.base.sharding import constrain, local_rows, num_batch_shards, put_batch
  from llm_jax.infer.mesh import loaded_on_mesh
  from llm_jax.losses.config import make_objective

  with loaded_on_mesh(args.workdir, args.checkpoint, args.mesh, trust=args.trust) as run:
    objective = make_objective(run.config.loss).eval_objective()
    if not objective.has_predictions:
      raise ConfigError(f'--workdir: {args.workdir} was trained with {", ".join(run.config.loss.terms)}, which has no '
                        'predictions for texts; to generate text, use llm-jax generate')
    if run.tokenizer is None:
      raise ConfigError(f'--workdir: {args.workdir} was trained on ids without a tokenizer, so it cannot read text')

    @jax.jit
    def predict(params: Any, batch: Any) -> Any:
      found = run.model.apply({'params': params}, batch,
                              method=lambda module, batch: objective.predict(module, batch))
      return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), found)  # all processes get all rows

    waiting('compiling')
    texts = iter(args.text if args.text is not None else (line.rstrip('\n') for line in sys.stdin))
    num_rows = num_batch_shards(run.mesh) * -(-ROWS // num_batch_shards(run.mesh))
    own = local_rows(run.mesh, num_rows)
    while part := from_first(list(islice(texts, ROWS)) if is_first() else None):  # the others may have the same stdin
      features = rows(run.config.data, run.tokenizer, part, num_rows)
      batch = put_batch({name: x[own] for name, x in features.items()}, own, num_rows, run.mesh)
      predictions = jax.device_get(predict(run.params, batch))
      for i, text in enumerate(part):
        of_text = {name: run.config.loss.sections[name].describe(x[i], args.top) for name, x in predictions.items()}
        print(json.dumps({'text': text, **of_text}, ensure_ascii=False), flush=True)


def rows(config: Any, tokenizer: Any, texts: list[str], num_rows: int) -> dict[str, np.ndarray]:
  """Features of up to `num_rows` documents, made and truncated as by the run's task."""
  import numpy as np

  from llm_jax.data.pipeline import stack
  from llm_jax.data.rows.examples import TRUNCATIONS
  from llm_jax.data.rows.tasks import Layout, cut, read_whole
  truncate = TRUNCATIONS[config.task_settings.needs][0] if config.truncate == 'auto' else config.truncate
  layout = Layout(config.seq_len, config.encoder_len, len(tokenizer.token_bytes), tokenizer.bos_id, tokenizer.eos_id,
                  truncate=truncate)
  keeps_bos = config.task_settings.capacity(layout) is not None  # otherwise the task cuts documents itself
  found = []
  for ids in tokenizer.encode(texts):
    row = np.array([tokenizer.bos_id, *map(int, ids), tokenizer.eos_id], np.int32)
    if len(row) > config.seq_len and truncate == 'left' and keeps_bos:
      row = np.concatenate([row[:1], row[1 - config.seq_len:]])
    found.append(read_whole(cut(row, config.seq_len, layout), layout))
  blank = {name: np.zeros_like(x) for name, x in found[0].items()}
  return stack(found + [blank] * (num_rows - len(found)))


if __name__ == '__main__':
  run_as_program(main)

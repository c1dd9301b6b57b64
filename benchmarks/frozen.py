"""FLOPs and memory of a training step with frozen parameters beside the step that trains all of them.

  python -m benchmarks.frozen

FLOPs are those of the matrix products in the step's program; memory is what the compiler plans for arguments and
temporary arrays. Nothing is run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

from llm_jax.base import runtime

# Name: pattern of the frozen parameters. The second freezes about 90% of them.
FROZEN = {'none': '', 'all but q and v': r'^(?!blocks/attn/[qv]/)', 'all but norms': '/w$'}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--rows', type=int, default=8, help='rows of 1024 tokens')
  args = flags.parse_args()
  runtime.prepare()

  import jax
  import jax.numpy as jnp
  from jax.interpreters import partial_eval

  from llm_jax.base.batch import Batch
  from llm_jax.models.decoder_config import DecoderConfig
  from llm_jax.models.registry import make_model
  from llm_jax.optim.chain import OptimConfig, make_optimizer
  from llm_jax.optim.groups import Group, trainable_paths
  from llm_jax.training.flops import count_in
  from llm_jax.training.shardings import boxed_params, param_info
  from llm_jax.training.state import init_state, train_step

  def used_part(jaxpr):
    """The program without equations that no result depends on; the compiler removes them too."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

  model = make_model(DecoderConfig(vocab_size=50_304, max_len=1024, dtype='float32', remat='full'))
  tokens = jax.ShapeDtypeStruct((args.rows, 1024), jnp.int32)
  batch = Batch(tokens=tokens, targets=tokens, loss_mask=jax.ShapeDtypeStruct(tokens.shape, jnp.float32))  # type: ignore
  info, rows = param_info(boxed_params(batch, model=model)), []
  for name, pattern in FROZEN.items():
    groups = {'frozen': Group(pattern, frozen=True)} if pattern else {}
    tx, is_trainable = make_optimizer(OptimConfig(groups=groups), 1000, info), trainable_paths(groups, info)
    state = jax.eval_shape(partial(init_state, model=model, tx=tx, is_trainable=is_trainable), jax.random.key(0), batch)
    step = jax.jit(partial(train_step, model=model, tx=tx, seed=0), donate_argnums=0)
    plan = step.lower(state, batch).compile().memory_analysis()
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.trainable, state.frozen))
    rows.append({'frozen': name, 'share': round(frozen / (trained + frozen), 3),
                 'gflops': round(count_in(used_part(step.trace(state, batch).jaxpr.jaxpr)) / 1e9),
                 'mib': round((plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 2**20)})
    print(rows[-1], flush=True)
  print(json.dumps({'benchmark': 'frozen', 'device': jax.devices()[0].device_kind, 'rows': rows}))


if __name__ == '__main__':
  main()

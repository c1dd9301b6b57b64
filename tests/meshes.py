"""Training on a mesh of virtual devices, to test what must not depend on the mesh."""

from functools import partial

import jax
import numpy as np

from llm_jax.base.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, put_batch, use_mesh
from llm_jax.training.shardings import abstract_state, boxed_params, shardings_of
from llm_jax.training.state import init_state, train_step


def mesh_config(sizes, **fields):
  """The MeshConfig of sizes by name, or of (data, fsdp, tensor, stage)."""
  return MeshConfig(**{'data': 1, **sizes}, **fields) if isinstance(sizes, dict) else MeshConfig(*sizes, **fields)


def train_on(sizes, model, tx, features, *, num_steps, state=None, is_trainable=lambda path: True, mesh_fields=None,
             **parts):
  """(metrics of each step, final state, its shardings) after training on features(0), features(1), ...

  Training starts from `state`, if given. `sizes` are those of mesh_config, `parts` are passed to train_step.
  """
  config = mesh_config(sizes, **(mesh_fields or {}))
  mesh = make_mesh(config, jax.devices()[:int(np.prod(config.sizes))])
  num_rows = len(features(0)['tokens'])
  with use_mesh(mesh, config):
    rows = local_rows(mesh, num_rows)
    example = put_batch(features(0), rows, num_rows, mesh)
    shardings = shardings_of(abstract_state(boxed_params(example, model=model), mesh, tx=tx, is_trainable=is_trainable))
    if state is None:
      init = jax.jit(partial(init_state, model=model, tx=tx, is_trainable=is_trainable), out_shardings=shardings)
      state = init(jax.random.key(0), example)
    step = jax.jit(partial(train_step, model=model, tx=tx, seed=0, **parts),
                   in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, shardings.step),
                   donate_argnums=0)
    state, history = jax.device_put(state, shardings), []
    for n in range(num_steps):
      state, metrics = step(state, put_batch(features(n), rows, num_rows, mesh))
      history.append({name: float(value) for name, value in metrics.items()})
  return history, state, shardings

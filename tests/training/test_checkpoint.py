"""Checkpoints: which are kept, restoring on another mesh, and damaged folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.config import CheckpointConfig
from llm_jax.training.checkpoint import Checkpoints


def arrays(seed):
  rng = np.random.default_rng(seed)
  return {'a': {'w': jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)}, 'step': jnp.asarray(seed, jnp.int32)}


def abstract(tree, sharding=None):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or a.sharding), tree)


def save_all(path, losses, **config):
  with Checkpoints(path, CheckpointConfig(**config)) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, arrays(step), (arrays(step + 1), ()), {'note': 'x'})
      if loss is not None:
        checkpoints.record(step, loss, 0, {'val/loss': loss})
    checkpoints.wait()
  with Checkpoints(path, CheckpointConfig(**config)) as checkpoints:
    return checkpoints.steps(), checkpoints.best_step()


def test_last_best_and_milestones_are_kept(tmp_path):
  losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0, 6: float('nan'), 7: 2.0}
  kept, best = save_all(tmp_path, losses, keep_last=2, keep_best=1, keep_every=5)
  assert (kept, best) == ([2, 5, 6, 7], 2)


def test_scores_before_the_newest_since_do_not_count(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig(keep_last=1)) as checkpoints:
    for step, score, since in ((1, 1.0, 0), (2, 5.0, 2), (3, 4.0, 2), (4, 6.0, 2)):
      checkpoints.save(step, arrays(step), (arrays(step), ()), {})
      checkpoints.record(step, score, since, {})
    checkpoints.wait()
  with Checkpoints(tmp_path, CheckpointConfig(keep_last=1)) as checkpoints:
    assert (checkpoints.steps(), checkpoints.best_step()) == ([3, 4], 3)


def test_the_latest_is_kept_beside_the_best(tmp_path):
  assert save_all(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}, keep_last=1, keep_best=1) == ([1, 3], 1)


def test_keep_best_0_keeps_no_best(tmp_path):
  assert save_all(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}, keep_last=2, keep_best=0)[0] == [2, 3]


def test_restored_arrays_are_equal_on_another_mesh(tmp_path):
  save_all(tmp_path, {3: 1.0})
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  tree = arrays(3)
  target = {'a': {'w': jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P('fsdp', 'tensor')))},
            'step': jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))}
  with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
    params, opt_state, meta = checkpoints.restore(target, (abstract(arrays(4)), ()))
    only_params, nothing, _ = checkpoints.restore(target)
  assert params['a']['w'].sharding.spec == P('fsdp', 'tensor')
  jax.tree.map(np.testing.assert_array_equal, (params, opt_state, only_params), (tree, (arrays(4), ()), tree))
  assert meta == {'step': 3, 'note': 'x'} and nothing is None


def test_arrays_may_be_donated_during_a_save(tmp_path):
  """A save in progress keeps its values although the next step overwrites the buffers."""
  step = jax.jit(lambda a: a + 1, donate_argnums=0)
  x = jnp.zeros((1024, 1024))
  with Checkpoints(tmp_path, CheckpointConfig(keep_last=9)) as checkpoints:
    for n in range(4):
      checkpoints.save(n, {'x': x}, {'y': x + 1}, {})
      for _ in range(10):
        x = step(x)
  with Checkpoints(tmp_path, CheckpointConfig(keep_last=9)) as checkpoints:
    for n in range(4):
      restored, _, _ = checkpoints.restore(abstract({'x': x}), step=n)
      np.testing.assert_array_equal(restored['x'], 10.0 * n)


@pytest.mark.parametrize('damage', ['empty folder', 'no meta', 'cut data'])
def test_a_damaged_checkpoint_falls_back_to_an_older_one(damage, tmp_path, capsys):
  save_all(tmp_path, {1: 1.0, 2: 2.0})
  if damage == 'empty folder':
    (tmp_path / '3').mkdir()
  elif damage == 'no meta':
    for path in (tmp_path / '2' / 'meta').iterdir():
      path.unlink()
  else:
    for path in (tmp_path / '2' / 'params').rglob('*'):
      if path.is_file():
        path.write_bytes(path.read_bytes()[:-20])
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    params, _, meta = checkpoints.restore(abstract(arrays(1)))
    checkpoints.set_aside_after(meta['step'])
    expected = 2 if damage == 'empty folder' else 1
    [aside] = tmp_path.glob('*.corrupt-*')
    assert aside.name.startswith(f'{expected + 1}.')
    assert meta['step'] == expected and checkpoints.steps()[-1] == expected
  jax.tree.map(np.testing.assert_array_equal, params, arrays(expected))
  assert str(aside.parent) in capsys.readouterr().err


def test_only_unreadable_checkpoints_are_an_error(tmp_path):
  save_all(tmp_path, {1: 1.0})
  for path in (tmp_path / '1' / 'meta').iterdir():
    path.unlink()
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(StorageError, match='step 1'):
    checkpoints.restore(abstract(arrays(1)))


def test_an_error_of_the_check_is_not_damage(tmp_path):
  save_all(tmp_path, {1: 1.0, 2: 1.0})

  def refuse(meta):
    raise ConfigError('other data')

  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(ConfigError, match='other data'):
    checkpoints.restore(abstract(arrays(1)), check=refuse)


OTHER = [
    ({'a': {'w': jnp.zeros((8, 8))}}, r'params/a/w: stored float32 \[16, 8\], wanted float32 \[8, 8\]'),
    ({'a': {'w': jnp.zeros((16, 8), 'bfloat16')}}, r'params/a/w: stored float32 \[16, 8\], wanted bfloat16 \[16, 8\]'),
    ({'a': {'v': jnp.zeros((16, 8))}}, r'(?s)a/v: missing; wanted float32 .*params/a/w: stored float32'),
    ({'a': {'w': jnp.zeros((16, 8)), 'b': jnp.zeros(8)}}, r'params/a/b: missing; wanted float32 \[8\]')]


@pytest.mark.parametrize(('other', 'message'), OTHER, ids=['shape', 'dtype', 'name', 'added'])
def test_other_arrays_are_refused_by_path(other, message, tmp_path):
  save_all(tmp_path, {1: 1.0, 2: 1.0})
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(ConfigError, match=message):
    checkpoints.restore(abstract(other | {'step': jnp.zeros((), jnp.int32)}))
  assert not list(tmp_path.glob('*.corrupt-*')), 'nothing is damaged'


def test_a_missing_step_is_reported_with_known_ones(tmp_path):
  save_all(tmp_path, {1: 1.0})
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(StorageError, match=r'\[1\]'):
    checkpoints.restore(abstract(arrays(1)), step=7)

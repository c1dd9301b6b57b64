"""The callback replica_check: a bit that differs between copies of an array is found, and the device named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from program import write_config

import llm_jax
from llm_jax.base.errors import DivergedError
from llm_jax.base.sharding import MESH_AXES, MeshConfig, make_mesh
from llm_jax.extras.replicas import differing_replicas

SHARDINGS = [((8, 1, 1), PartitionSpec()), ((4, 2, 1), PartitionSpec('fsdp')),
             ((2, 2, 2), PartitionSpec(None, 'tensor'))]


def flipped(x, device, element=0, bit=30):
  """The array with one bit flipped in the copy of one device."""
  buffers = []
  for shard in x.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      data.view(f'u{data.dtype.itemsize}').reshape(-1)[element] ^= 1 << min(bit, 8 * data.dtype.itemsize - 2)
    buffers.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, buffers)


def arrays(sizes, spec, dtype):
  mesh = make_mesh(MeshConfig(*sizes))
  assert mesh.axis_names == MESH_AXES
  values = np.random.default_rng(0).normal(size=(8, 16))
  put = lambda x, spec: jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, spec))  # noqa: E731
  return {'a': put(values, spec), 'b': put(values[0], PartitionSpec()), 'step': put(3, PartitionSpec()),
          'whole': put(values, PartitionSpec(('data', 'fsdp'), 'tensor'))}


@pytest.mark.parametrize(('sizes', 'spec'), SHARDINGS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_flipped_bit_names_array_and_device(sizes, spec, dtype):
  tree, random = arrays(sizes, spec, dtype), np.random.default_rng(1)
  assert differing_replicas(tree) == []


  for device in random.choice(jax.devices(), 3, replace=False):
    for bit in (0, 13, 30):
      element = int(random.integers(16))
      found = differing_replicas({**tree, 'a': flipped(tree['a'], device, element, bit)})
      assert found == [f'a on {device} of process 0']
      assert differing_replicas({**tree, 'whole': flipped(tree['whole'], device)}) == [], 'only one copy of each slice'


def test_two_copies_that_differ_are_both_named():
  tree = arrays((2, 4, 1), PartitionSpec('fsdp'), 'float32')
  first, fifth = jax.devices()[0], jax.devices()[4]
  assert differing_replicas({'a': flipped(tree['a'], first)}) == [
      f'a on {first} of process 0, {fifth} of process 0 (as many copies have each value)']


def test_a_run_ends_at_the_check_after_a_bit_is_flipped(tmp_path):
  def flip(event):
    if event.step == 2:
      state = event.session.state
      norm = state.trainable['norm']['scale'] if 'norm' in state.trainable else jax.tree.leaves(state.trainable)[0]
      bad = flipped(norm, jax.devices()[3])
      event.session.state = state.replace(trainable=jax.tree.map(lambda x: bad if x is norm else x, state.trainable))

  config = llm_jax.load_config(write_config(tmp_path), **{
      'num_steps': 8, 'eval.every': 0, 'log.callbacks': ('replica_check',), 'log.replica_check.every': 1})
  with pytest.raises(DivergedError, match=r'copies of the same array differ .*params/.* on .*3 of process 0') as e:
    for _ in llm_jax.train(config, tmp_path / 'run', callbacks=[flip]):
      pass
  assert 'The last check that passed was at step 1' in str(e.value) and e.value.exit_code == 70

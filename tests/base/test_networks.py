"""The order of devices over slices and hosts: the inner part of each axis stays within one."""

import dataclasses

import numpy as np
import pytest

from llm_jax.base.errors import ConfigError
from llm_jax.base.networks import over_networks
from llm_jax.base.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int
  slice_index: int = 0
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100 80GB HBM3'


def hosts(count, size=8):
  return [Device(i, i // size) for i in range(count * size)]


def slices(count, size=8, platform='cpu'):
  return [Device(i, i // 4, i // size, platform) for i in range(count * size)]


def order(devices, sizes, **between):
  found = over_networks(sizes, {'data': between.get('data', 1), 'fsdp': between.get('fsdp', 1)}, devices)
  return found


def part(x, of):
  return np.vectorize(lambda device: getattr(device, of))(x)


@pytest.mark.parametrize(('sizes', 'between'), [
    ({'data': 2, 'fsdp': 8, 'tensor': 1}, {'data': 2}), ({'data': 8, 'fsdp': 2, 'tensor': 1}, {'fsdp': 2}),
    ({'data': 4, 'fsdp': 2, 'tensor': 2}, {'data': 2}), ({'data': 2, 'fsdp': 4, 'tensor': 2}, {'fsdp': 2}),
    ({'data': 16, 'fsdp': 1, 'tensor': 1}, {'data': 2}), ({'data': 1, 'fsdp': 16, 'tensor': 1}, {'fsdp': 2})])
@pytest.mark.parametrize(('devices', 'of'), [(hosts(2), 'process_index'), (slices(2), 'slice_index')])
def test_the_inner_part_of_each_axis_stays_within_a_host_or_slice(devices, of, sizes, between):
  mesh = order(devices, sizes, **between)
  assert mesh.shape == tuple(sizes.values()) and len(set(mesh.flat)) == 16
  axis = list(sizes).index(next(iter(between)))
  halves = np.split(part(mesh, of), 2, axis=axis)
  assert [set(half.flat) for half in halves] == [{0}, {1}]


def test_both_axes_may_go_over_the_network():
  mesh = part(order(hosts(4, 4), {'data': 4, 'fsdp': 4, 'tensor': 1}, data=2, fsdp=2), 'process_index')[..., 0]
  np.testing.assert_array_equal(mesh, [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


def test_parts_may_be_several_hosts_of_gpus():
  mesh = part(order(hosts(4, 2), {'data': 2, 'fsdp': 4}, data=2), 'process_index')
  np.testing.assert_array_equal(mesh, [[0, 0, 1, 1], [2, 2, 3, 3]])


def test_hosts_with_a_process_for_each_gpu_are_one_part_where_jax_says_so():
  devices = [Device(i, i, i // 4) for i in range(8)]
  np.testing.assert_array_equal(part(order(devices, {'data': 2, 'fsdp': 4}, data=2), 'slice_index'),
                                [[0] * 4, [1] * 4])


def test_without_factors_slices_go_on_the_first_axis_that_can():
  assert set(part(order(slices(2), {'data': 2, 'fsdp': 8}), 'slice_index')[0]) == {0}
  assert set(part(order(slices(2), {'data': 1, 'fsdp': 16}), 'slice_index')[0][:8]) == {0}
  assert order(hosts(2), {'data': 16, 'fsdp': 1}) is None, 'hosts in their order'
  assert order(slices(2, platform='gpu'), {'data': 1, 'fsdp': 1, 'tensor': 16}) is None, 'a tensor axis over two hosts'


@pytest.mark.parametrize(('devices', 'sizes', 'between', 'message'), [
    (hosts(2), {'data': 3, 'fsdp': 1}, {'data': 2}, 'dcn_data 2 must divide data, which is 3'),
    (hosts(2), {'data': 16, 'fsdp': 1}, {'data': 4}, r'dcn_fsdp = 4, but there are 2 processes'),
    (hosts(1), {'data': 8, 'fsdp': 1}, {'data': 2}, 'but there are 1 processes'),
    (slices(1, platform='tpu'), {'data': 8, 'fsdp': 1}, {'data': 2}, 'but there are 1 slices here'),
    (slices(4, platform='tpu'), {'data': 32, 'fsdp': 1}, {'data': 2}, r'= 2, but there are 4 slices here'),
    (slices(2, platform='tpu'), {'data': 1, 'fsdp': 1, 'tensor': 16}, {}, 'must be a multiple of the 2 slices'),
    (hosts(2)[:12], {'data': 12, 'fsdp': 1}, {'data': 2}, 'different numbers of devices')])
def test_factors_that_do_not_fit_are_reported(devices, sizes, between, message):
  with pytest.raises(ConfigError, match=message):
    order(devices, sizes, **between)


def test_a_config_with_factors_needs_as_many_processes():
  with pytest.raises(ConfigError, match='but there are 1 processes'):
    make_mesh(MeshConfig(dcn_data=2))
  with pytest.raises(ValueError, match='dcn_data and dcn_fsdp must be at least 1'):
    MeshConfig(dcn_fsdp=0)

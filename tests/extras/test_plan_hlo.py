"""Compiled programs whose collectives, loops, kernels and memory traffic are known beforehand."""

import functools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.extras.plan import hlo
from llm_jax.extras.plan.collectives import read_collectives, replica_groups
from llm_jax.extras.plan.traffic import hbm_bytes

# In the forms of the compilers for these devices, which differ from a CPU's.
GPU, TPU = (Path(__file__).with_name(f'plan_{name}.hlo').read_text() for name in ('gpu', 'tpu'))
AXES = {'data': 2, 'fsdp': 2, 'tensor': 2}
ROWS, WIDTH = 64, 32  # of a device's float32 array
SIZE = 4 * ROWS * WIDTH


@functools.cache
def text_of(function):
  """The compiled text of a function of an array of ROWS x WIDTH a device, under shard_map over all axes."""
  mesh, spec = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(AXES)), PartitionSpec(tuple(AXES))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
  return jax.jit(mapped).lower(x).compile().as_text()


def gather(x, axis):
  return jax.lax.all_gather(x, axis, tiled=True)[:ROWS] * 2


def reduce(x, axis):
  return jax.lax.psum(x, axis)


def scatter(x, axis):
  return jnp.tile(jax.lax.psum_scatter(x, axis, tiled=True), (2, 1))


def exchange(x, axis):
  return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def permute(x, axis):
  return jax.lax.ppermute(x, axis, [(0, 1), (1, 0)])


# Bytes on the wire for two devices: half of what is gathered (two arrays), twice half of what is reduced, and so on.
CASES = {'all-gather': (gather, SIZE, (2 * ROWS, WIDTH)), 'all-reduce': (reduce, SIZE, (ROWS, WIDTH)),
         'reduce-scatter': (scatter, SIZE / 2, (ROWS, WIDTH)), 'all-to-all': (exchange, SIZE / 2, None),
         'collective-permute': (permute, SIZE, (ROWS, WIDTH))}


@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('kind', CASES)
def test_a_collective_over_one_axis(kind, axis):
  function, wire, shape = CASES[kind]
  [found] = read_collectives(text_of(functools.partial(function, axis=axis)), AXES)
  assert (found.kind, found.axes, found.dtype, found.executions) == (kind, (axis,), 'f32', 1)
  assert found.wire_bytes == wire and shape in (None, found.shape)
  assert not found.overlapped and 'shard_map' in found.op


@pytest.mark.parametrize('axes', [('data', 'fsdp'), ('data', 'tensor'), ('data', 'fsdp', 'tensor')])
def test_a_collective_over_several_axes(axes):
  [found] = read_collectives(text_of(functools.partial(reduce, axis=axes)), AXES)
  devices = 2 ** len(axes)
  assert found.axes == axes and found.wire_bytes == 2 * SIZE * (devices - 1) / devices


def nested(x):
  def inner(x, _):
    return jnp.tanh(permute(x, 'fsdp')), None

  def outer(x, _):
    return jax.lax.scan(inner, reduce(x, 'tensor'), None, length=3)[0], None

  return scatter(jax.lax.scan(outer, x, None, length=5)[0], 'data')


@pytest.mark.parametrize('noted', [True, False])
def test_loops_multiply_executions(noted):
  text = text_of(nested)
  assert 'known_trip_count' in text
  if not noted:  # as in a TPU's program
    text = text.replace('known_trip_count', 'unknown')
  found = {(one.kind, one.axes[0]): one.executions for one in read_collectives(text, AXES)}
  assert found == {('collective-permute', 'fsdp'): 15, ('all-reduce', 'tensor'): 5, ('reduce-scatter', 'data'): 1}


def test_a_loop_that_ends_by_data_counts_once_and_a_branch_whenever_the_conditional_is_reached():
  def search(x):
    return jax.lax.while_loop(lambda x: jnp.max(x) < 3, lambda x: reduce(x, 'fsdp') + 1, x)

  def step(x, _):
    return jax.lax.cond(x[0, 0] > 0, lambda x: reduce(x, 'data'), lambda x: permute(x, 'tensor'), x), None

  [found] = read_collectives(text_of(search), AXES)
  assert found.executions == 1
  executions = {one.kind: one.executions
                for one in read_collectives(text_of(lambda x: jax.lax.scan(step, x, None, length=4)[0]), AXES)}
  assert executions == {'all-reduce': 4, 'collective-permute': 4}


def test_groups_of_one_device_send_nothing():
  assert not read_collectives(text_of(lambda x: x + 1), AXES)
  text = 'ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n' \
         '  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add\n}\n'
  assert not read_collectives(text, {'data': 2})


def compiled(function, *shapes):
  return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_traffic_of_a_product_is_operands_and_result():
  size = 4 * (64 * 128 + 128 * 256 + 64 * 256)
  assert hbm_bytes(compiled(jnp.dot, (64, 128), (128, 256))) == size


def test_traffic_of_a_loop_over_layers_is_a_slice_each():
  """Each layer reads its own matrix, a 16th of the stack, and the vector once or a few times."""
  def layers(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, stack)[0]

  stack, vector = 4 * 16 * 256 * 256, 4 * 256
  moved = hbm_bytes(compiled(layers, (256,), (16, 256, 256)))
  assert stack <= moved <= 3.5 * stack + 16 * 20 * vector  # the slice may be copied out first, and the stack laid out


def test_traffic_of_an_update_in_place_is_the_update():
  text = """
%fused (p0: f32[16,1024], p1: f32[1,1024], p2: s32[]) -> f32[16,1024] {
  %p0 = f32[16,1024]{1,0} parameter(0)
  %p1 = f32[1,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[16,1024]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%taken (p0: f32[16,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[16,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %main (a: f32[16,1024], i: s32[]) -> f32[16,1024] {
  %a = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%taken
  ROOT %b = f32[16,1024]{1,0} fusion(%a, %row, %i), kind=kLoop, calls=%fused
}
"""
  row = 4 * 1024
  assert hbm_bytes(text) == 4 * row + 2 * 4  # each reads a row and the index, and writes a row
  whole = 'ROOT %b = f32[16,1024]{1,0} fusion(%a, %row, %i), kind=kLoop, calls=%fused'
  assert whole in text
  beside = text.replace(whole, """%started = ((f32[16,1024]{1,0}, f32[1,1024]{1,0}, s32[]), f32[16,1024]{1,0}, u32[])\
 fusion-start(%a, %row, %i), kind=kLoop, calls=%fused
  ROOT %b = f32[16,1024]{1,0} fusion-done(%started)""")
  assert hbm_bytes(beside) == hbm_bytes(text)  # as a GPU runs it beside other work


@pytest.mark.parametrize(('text', 'groups'), [
  ('{{0,4},{1,5},{2,6},{3,7}}, dimensions={0}', [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ('{}, to_apply=%add', [[0, 1, 2, 3, 4, 5, 6, 7]]),
  ('[2,4]<=[8], dimensions={0}', [[0, 1, 2, 3], [4, 5, 6, 7]]),
  ('[4,2]<=[2,4]T(1,0), dimensions={0}', [[0, 4], [1, 5], [2, 6], [3, 7]]),
  ('[1,8]<=[8]', [[0, 1, 2, 3, 4, 5, 6, 7]]),
  ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
  ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
  ("mesh['a'=4,'b'=2] {'b','a'}", [[0, 2, 4, 6, 1, 3, 5, 7]]),
  ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
  ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
  ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
])
def test_forms_of_replica_groups(text, groups):
  assert replica_groups(f', channel_id=1, replica_groups={text}', 8).tolist() == groups


def test_asynchronous_collectives_of_a_gpu():
  found = {one.kind: one for one in read_collectives(GPU, {'fsdp': 2, 'tensor': 4})}
  size = 2 * 64 * 64
  gathered, reduced, scattered = (found[kind] for kind in ('all-gather', 'all-reduce', 'reduce-scatter'))
  assert (gathered.axes, gathered.wire_bytes, gathered.shape) == (('fsdp',), size, (128, 64))
  assert (reduced.axes, reduced.wire_bytes) == (('tensor',), 2 * size * 3 / 4)
  assert (scattered.axes, scattered.wire_bytes, scattered.executions) == (('tensor',), size * 3 / 4, 1)
  assert (gathered.overlapped, reduced.overlapped, scattered.overlapped) == (True, False, True)
  assert gathered.op == 'jit(step)/gather' and gathered.dtype == 'bf16'
  assert hlo.kernels(GPU) == {'__triton_gemm': 1, '__cudnn$fmhaSoftmax': 1}
  assert not any(one.overlapped for one in read_collectives(GPU.replace('"is_sync":false', '"is_sync":true'),
                                                            {'fsdp': 2, 'tensor': 4}) if one.kind == 'all-gather')


def test_fused_collectives_of_a_tpu():
  """Four iterations, i = 1, 3, 5, 7; one all-gather in three pieces; an all-reduce and a slice are a reduce-scatter."""
  gathered, scattered = sorted(read_collectives(TPU, {'fsdp': 4, 'tensor': 2}), key=lambda one: one.kind)
  assert (gathered.kind, gathered.axes, gathered.executions) == ('all-gather', ('fsdp',), 4)
  assert (gathered.wire_bytes, gathered.overlapped, gathered.op) == (2 * 32 * 64 * 3 / 4, True, 'jit(step)/layer')
  assert (scattered.kind, scattered.axes, scattered.executions) == ('reduce-scatter', ('tensor',), 4)
  assert (scattered.wire_bytes, scattered.overlapped, scattered.op) == (4 * 64 * 64 / 2, False, 'jit(step)/output')
  assert hlo.kernels(TPU) == {'kernel': 4}


def test_traffic_of_a_tpu_leaves_out_what_is_on_the_chip():
  matrix, shard = 4 * 64 * 64, 2 * 8 * 64
  # A gather reads the shard; the fusion beside it reads and writes a matrix, the kernel reads one; a reduce-scatter
  # reads one and writes half. The gathered array and the kernel's result are in on-chip memory.
  scalar = 4  # the addition of the loop's counter; the condition has one comparison of two
  assert hbm_bytes(TPU) == 4 * (shard + 2 * matrix + matrix + 1.5 * matrix + 3 * scalar) + 5 * (2 * scalar + 1)


SLICES = """
HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: bf16[64,32], b: f32[16]) -> f32[16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %token = token[] after-all()
  %sum = f32[16]{0} all-reduce(%b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %send = (bf16[64,32]{1,0}, u32[], token[]) send(%a, %token), is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="g_0",\
_xla_megascale_target=TARGET,_xla_megascale_transfer_type="KIND"}
  %recv = (bf16[64,32]{1,0}, u32[], token[]) recv(%token), frontend_attributes={_xla_host_transfer_rendezvous="g_0"}
  %received = (bf16[64,32]{1,0}, token[]) recv-done(%recv)
  ROOT %product = f32[16]{0} fusion(%sum), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize(('kind', 'target', 'axes', 'arrays'), [
  ('ALL_REDUCE', '"{1,2,3,4}x{0:3}"', ('data', 'fsdp'), 2 * 3 / 4),
  ('ALL_REDUCE', '"{1:4}x{0:3}"', ('data', 'fsdp'), 2 * 3 / 4),
  ('ALL_GATHER', '{{100000,200000},{100001,200001},{300000,400000}}', ('fsdp',), 1),
  ('REDUCE_SCATTER', '{{100000,300000},{100001,300001}}', ('data',), 1 / 2),
  ('ONE_TO_ONE', '{{100000,300000}}', ('data',), 1)])
def test_transfers_between_slices(kind, target, axes, arrays):
  """Four slices of 2 x 2, of which a pair splits each axis; the program numbers the devices of one slice."""
  parts = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
  text = SLICES.replace('TARGET', target).replace('KIND', kind)
  between, within = read_collectives(text, {'data': 4, 'fsdp': 4}, parts)
  known = kind.lower().replace('_', '-')
  assert between.kind == ('collective-permute' if kind == 'ONE_TO_ONE' else known)
  assert (between.axes, between.outside, between.wire_bytes) == (axes, 1.0, arrays * 2 * 64 * 32)
  assert not between.overlapped
  assert (within.axes, within.outside, within.wire_bytes) == (('fsdp',), 0.0, 4 * 16)
  later = text.replace('  %recv =', '  %other = f32[16]{0} fusion(%b), kind=kLoop, calls=%fused\n  %recv =')
  assert read_collectives(later, {'data': 4, 'fsdp': 4}, parts)[0].overlapped


def test_instructions_are_read_whole():
  module = hlo.parse(TPU)
  assert module.tpu and module.entry == 'main' and not hlo.parse(GPU).tpu
  body = module.computations['body']
  assert body.instructions['kernel.3'].attribute('op_name') == 'jit(step)/kernel/pallas_call'
  assert body.root.name == 'results' and module.executions == Counter(
    main=1, body=4, condition=5, starts=4, finishes=4, add=4, **{'async_collective_fusion.1': 4,
                                                                 'all-reduce-scatter.1': 4})
  assert [hlo.bits(dtype) for dtype in ('pred', 'bf16', 'f8e4m3fn', 's4', 'c64', 'token')] == [8, 16, 8, 4, 64, 0]

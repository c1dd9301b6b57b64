"""The compiled step on eight devices: what it sends and holds, read in the text that the compiler writes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build as build_config
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from llm_jax.config import Config
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.losses.objective import Objective
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.optim.chain import make_optimizer
from llm_jax.training.log import unpack_metrics
from llm_jax.training.program import jit_step
from llm_jax.training.shardings import abstract_state, boxed_params, param_info, shardings_of
from llm_jax.training.state import init_state

# Each dimension has a size of its own, so that shapes in the text tell what an array is.
B, T, D, F, V, L = 32, 48, 80, 224, 352, 3
TENSOR_AXES = ('heads', 'kv_heads', 'mlp', 'vocab', 'act_heads', 'act_kv_heads', 'act_mlp', 'act_vocab', 'act_stream',
               'act_lookup_length')
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)]


def build(sizes=(1, 1, 1), rules=(), num_microbatches=1, **fields):
  """(the lowered step, a function that makes its arguments)."""
  cfg = DecoderConfig(**{'vocab_size': V, 'max_len': T, 'num_layers': L, 'embed_dim': D, 'num_heads': 8, 'head_dim': 10,
                         'mlp_dim': F, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope', 'dtype': 'float32',
                         'attention': 'xla', **fields})
  model, shape = Decoder(cfg), MeshConfig(*sizes, rules=rules)
  mesh = make_mesh(shape, jax.devices()[:int(np.prod(sizes))])
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (B, T + 1), np.int32)
  batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=np.ones((B, T), np.float32),
                positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), segment_ids=np.ones((B, T), np.int32))
  example = jax.tree.map(lambda x: jnp.asarray(x[:1]), batch)
  config = Config()
  boxed = boxed_params(example, model=model)
  tx = make_optimizer(config.optim, 100, param_info(boxed))
  with use_mesh(mesh, shape):
    abstract = abstract_state(boxed, mesh, tx=tx, is_trainable=lambda path: True)
  shardings = shardings_of(abstract)
  step = jit_step(config, mesh, shardings, {}, num_microbatches, model=model, tx=tx, objective=Objective())

  def arguments():
    init = jax.jit(lambda key: init_state(key, example, model=model, tx=tx), out_shardings=shardings)
    return init(jax.random.key(0)), jax.device_put(batch, batch_sharding(mesh)), {}

  with use_mesh(mesh, shape):
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch)
    return mesh, step.lower(abstract, held, {}), arguments


def compiled_text(sizes, rules=(), **fields):
  mesh, lowered, _ = build(sizes, rules, **fields)
  with jax.set_mesh(mesh):
    return lowered.compile().as_text()


def collectives(text, kind):
  """The shapes (dtype, sizes) of what collectives of this kind return."""
  lines = [line for line in text.splitlines() if re.search(rf' {kind}(-start)?\(', line)]
  return [(dtype, tuple(map(int, sizes.split(',')))) for line in lines
          for dtype, sizes in re.findall(r'\b(bf16|f32|s32)\[([\d,]+)\]', line.partition(f' {kind}')[0])]


def carried(text):
  """The lines of loops: the arrays that they carry."""
  return '\n'.join(line for line in text.splitlines() if ' while(' in line)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('sizes', [sizes for sizes in MESHES if sizes[0] * sizes[1] > 1])
def test_no_device_holds_the_activations_of_the_whole_batch(sizes, tied, capfd):
  """They would be gathered at the lookup of embeddings, forward and backward, and at the sum of table gradients."""
  text = compiled_text(sizes, tie_embeddings=tied, positions='rope' if tied else 'learned')
  assert 'rematerialization' not in capfd.readouterr().err
  whole = [shape for shape in re.findall(r'\bf32\[([\d,]+)\]', text)
           if np.prod(list(map(int, shape.split(',')))) >= B * T * D and f'{L},' not in shape]
  assert not whole


@pytest.mark.parametrize('sizes', [sizes for sizes in MESHES if sizes[2] > 1])
def test_layers_share_the_length_of_the_residual_stream(sizes):
  """Between the layers a tensor device holds its part of the length; what it saves for the backward pass too."""
  text = compiled_text(sizes, remat='full')
  rows, length = B // (sizes[0] * sizes[1]), T // sizes[2]
  assert f'f32[{L},{rows},{length},{D}]' in carried(text) and f'f32[{L},{rows},{T},{D}]' not in carried(text)
  assert (rows, T, D) in [shape for _, shape in collectives(text, 'all-gather')]


@pytest.mark.parametrize('num_microbatches', [1, 4])
@pytest.mark.parametrize('tied', [True, False])
def test_devices_with_whole_copies_sum_each_gradient_once_in_a_step(num_microbatches, tied):
  """Not in each microbatch, and the embedding that is tied to the readout not twice."""
  text = compiled_text((8, 1, 1), num_microbatches=num_microbatches, tie_embeddings=tied)
  sums = [np.prod(shape) for _, shape in collectives(text, 'all-reduce')]
  num_params = (2 - tied) * V * D + L * (4 * D * D + 3 * D * F + 2 * D) + D
  assert num_params <= sum(sums) <= num_params + 100
  assert len(collectives(text[text.index('ENTRY'):], 'all-reduce')) == len(sums)


@pytest.mark.parametrize('num_microbatches', [1, 4])
@pytest.mark.parametrize(('sizes', 'tied'), [((4, 1, 2), True), ((2, 2, 2), True), ((2, 2, 2), False)])
def test_a_tensor_axis_changes_nothing_of_that(sizes, tied, num_microbatches):
  positions = 'learned' if tied else 'rope'
  text = compiled_text(sizes, num_microbatches=num_microbatches, tie_embeddings=tied, positions=positions)
  found = read_collectives(text, dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)))
  sent = sum(each.executions * each.wire_bytes for each in found if 'data' in each.axes)
  gradients = (2 - tied) * V * D + (positions == 'learned') * T * D + L * (4 * D * D + 3 * D * F)
  once = 2 * (1 - 1 / sizes[0]) * 4 * gradients / sizes[1] / sizes[2]  # 4 bytes each, in a ring
  assert once <= sent < 1.05 * once  # and norms, whole on each device, and metrics


@pytest.mark.parametrize(('sizes', 'fields'), [
    ((2, 2, 2), {'tie_embeddings': True}), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ((4, 2, 1), {}), ((4, 2, 1), {'einsum': 'bitnet'}),
            ((2, 2, 2), {'einsum': 'bitnet', 'positions': 'learned'})))], ids=str)
def test_gradients_do_not_depend_on_how_a_batch_is_split(sizes, fields):
  def update(sizes, num_microbatches, **fields):
    mesh, lowered, arguments = build(sizes, num_microbatches=num_microbatches, **fields)
    with jax.set_mesh(mesh):
      state, metrics = lowered.compile()(*arguments())
      return jax.device_get(state.trainable), unpack_metrics(metrics)

  (expected, told), (found, metrics) = update((1, 1, 1), 1, **fields), update(sizes, 4, **fields)
  off = np.concatenate(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).ravel(), found, expected)))
  assert np.mean(off > 1e-6) < 1e-2  # Adam's first update has the sign of a gradient, also of one near 0
  assert metrics.keys() == told.keys()
  for name, value in told.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('sizes', [(1, 1, 8), (2, 2, 2)])
def test_logits_are_never_gathered(sizes):
  text = compiled_text(sizes, tie_embeddings=False)
  assert f',{V // sizes[2]}]' in text
  assert not re.search(rf'\[\d+,{T},{V}\]', text)


def test_weights_are_gathered_once_in_each_pass():
  """Of three layers in one scan, so one instruction for all: forward, and backward for the gradients of inputs."""
  gathers = [shape for _, shape in collectives(compiled_text((1, 8, 1), remat='none'), 'all-gather')]
  assert sum(np.prod(shape) == D * F for shape in gathers) == 3 * 2  # gate, up and down
  assert not any(np.prod(shape) > max(D * F, D * V) for shape in gathers)


def test_gradients_of_matrices_are_summed_in_gradient_dtype():
  def products(name):
    _, lowered, _ = build((8, 1, 1), gradient_dtype=name)
    return set(re.findall(rf'dot_general.*-> tensor<{D}x{F}x(\w+)>', lowered.as_text()))
  assert products('bfloat16') == {'bf16'} and products('float32') == {'f32'}


LOW = {'dtype': 'bfloat16', 'product_dtype': 'bfloat16', 'stream_dtype': 'bfloat16', 'gradient_dtype': 'bfloat16'}


def test_activations_are_saved_in_the_dtype_of_the_stream():
  text = build(remat='full', **LOW)[1].as_text()  # not compiled: a CPU computes in float32
  assert f'tensor<{L}x{B}x{T}x{D}xbf16>' in text and f'tensor<{L}x{B}x{T}x{D}xf32>' not in text


@pytest.mark.parametrize('sizes', [(4, 2, 1), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
    (1, 1, 1), (2, 2, 2)))])
def test_a_run_in_bfloat16_learns_like_one_in_float32(sizes):
  def losses(**fields):
    mesh, lowered, arguments = build(sizes, **fields)
    with jax.set_mesh(mesh):
      step, (state, batch, constants) = lowered.compile(), arguments()
      found = []
      for _ in range(4):
        state, metrics = step(state, batch, constants)
        found.append(unpack_metrics(metrics)['loss'])
    return found, state

  low, state = losses(**LOW)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trainable))
  np.testing.assert_allclose(low, losses()[0], rtol=5e-3)


@pytest.mark.slow
def test_rules_of_the_config_change_what_is_sharded():
  sizes, length = (1, 4, 2), T // 2
  assert f'f32[{L},{B // 4},{length},{D}]' in carried(compiled_text(sizes, remat='full'))
  assert f'f32[{L},{B // 4},{T},{D}]' in carried(compiled_text(sizes, ('act_stream=none',), remat='full'))

  def shards(rules):
    mesh, _, arguments = build(sizes, rules)
    with jax.set_mesh(mesh):
      return arguments()[0].trainable['blocks']['mlp']['up']['w'].sharding.shard_shape((L, D, F))

  assert shards(()) == (L, D // 4, F // 2)
  assert shards(('embed=none',)) == (L, D, F // 2)
  assert shards(('embed=fsdp+tensor', *(f'{axis}=none' for axis in TENSOR_AXES))) == (L, D // 8, F)


@pytest.mark.slow
def test_rules_do_not_change_losses():
  def loss(sizes, rules=()):
    mesh, lowered, arguments = build(sizes, rules)
    with jax.set_mesh(mesh):
      return unpack_metrics(lowered.compile()(*arguments())[1])['loss']
  expected = loss((1, 1, 1))
  for rules in (('act_stream=none',), ('vocab=none', 'act_vocab=none'), ('embed=data+fsdp', 'act_lookup=none')):
    np.testing.assert_allclose(loss((2, 2, 2), rules), expected, rtol=1e-5)


@pytest.mark.parametrize(('rules', 'words'), [
    (('mpl=tensor',), "got 'mpl=tensor'"), (('mlp=model',), 'mesh axes of stage, data, fsdp, context, tensor'),
    (('mlp',), "got 'mlp'"),
    (('act_batch=data',), 'rules cannot change act_batch')])
def test_rules_that_cannot_be_are_refused(rules, words):
  with pytest.raises(ConfigError, match=f'config.mesh.*{words}'):
    build_config(Config, {'mesh': {'rules': rules}})


def test_rules_that_collide_are_refused():
  with pytest.raises(ConfigError, match=r'config.mesh.rules: .*map two dimensions to one mesh axis'):
    build((1, 4, 2), ('embed=tensor',))

"""BitNet in folders of transformers: the packed form and what is computed from it by its equations in NumPy, training
further from it, export of a run, and equality with transformers where torch is installed."""

import dataclasses
import json
import random

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_config
from safetensors.numpy import load_file, save_file
from test_families import batch_of, read
from weights import tensors

from llm_jax.base.builder import Sections, build
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.config import Config
from llm_jax.data.config import DataConfig
from llm_jax.data.pipeline import example_batch
from llm_jax.extras.bitnet import BitNet, weight_codes
from llm_jax.extras.bitnet_hf import pack_hf
from llm_jax.extras.bitnet_pack import packed_model, unpacked
from llm_jax.hf.check import LARGEST_ROUNDED, _open, can_check
from llm_jax.hf.export import write_model
from llm_jax.hf.family import read_model
from llm_jax.hf.folder import HuggingFace
from llm_jax.hf.ternary import quantized
from llm_jax.infer.load import Loaded
from llm_jax.layers.clock import clock_at
from llm_jax.models.registry import MODELS, make_model
from llm_jax.training.shardings import boxed_params, param_info

KINDS = {'bitlinear': {}, 'autobitlinear': {'linear_class': 'autobitlinear', 'quantization_mode': 'offline'},
         'online': {'linear_class': 'autobitlinear', 'quantization_mode': 'online'}}
SHAPE = {'vocab_size': 67, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 128, 'rms_norm_eps': 1e-5, 'pad_token_id': None,
         'bos_token_id': None, 'eos_token_id': None}
CONFIGS = {'llama': SHAPE | {'model_type': 'llama', 'attention_bias': True},
           'bitnet': SHAPE | {'model_type': 'bitnet', 'hidden_act': 'relu2', 'rope_theta': 10000.0}}


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


def write(folder, values, kind, mesh, seed=0):
  """A folder as transformers writes it; returns {name: matrix that it stands for}."""
  values = values | {'attention_bias': values.get('attention_bias', False) and kind != 'autobitlinear'}
  online = values | {'quantization_config': {'quant_method': 'bitnet'} | KINDS['online']}
  plain = tensors(*read_model(online, ''), mesh, seed)
  found, means = dict(plain), {}
  for name, x in plain.items():
    if '_proj.weight' in name and kind != 'online':
      codes, scale = quantized(x, '1.58')
      found[name] = pack_hf(codes)
      found[f'{name}_scale'] = np.reshape(1 / scale if kind == 'bitlinear' else scale, 1)
      means[name] = (codes, 1 / found[f'{name}_scale'] if kind == 'bitlinear' else scale)
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(
      values | {'quantization_config': {'quant_method': 'bitnet'} | KINDS[kind]}))
  save_file(found, folder / 'model.safetensors')
  return plain, means


def logits_of(model, params, tokens):
  return np.asarray(jax.jit(lambda params: model.apply({'params': params}, batch_of(tokens)))(params))


def equations(values, plain, tokens):
  """The forward pass of modeling_llama.py and modeling_bitnet.py with BitLinear, in NumPy."""
  own, N, K = values['model_type'] == 'bitnet', 4, 2

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * plain[name + '.weight']

  def linear(x, name):
    codes, scale = quantized(plain[name + '.weight'], '1.58')
    x_scale = 127 / np.abs(x).max(-1, keepdims=True)
    y = np.round(x * x_scale).clip(-128, 127) @ codes.T / x_scale * scale
    return y + plain.get(name + '.bias', 0)

  def rotated(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 10000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = plain['model.embed_tokens.weight'][tokens].astype(np.float64)
  B, T = tokens.shape
  for layer in range(values['num_hidden_layers']):
    at = f'model.layers.{layer}.'
    h = norm(x, at + 'input_layernorm')
    q, k, v = (linear(h, f'{at}self_attn.{n}_proj').reshape(B, T, heads, -1) for n, heads in
               (('q', N), ('k', K), ('v', K)))
    k, v = (np.repeat(y, N // K, 2) for y in (rotated(k), v))
    scores = np.einsum('btnh,bsnh->bnts', rotated(q), k) / q.shape[-1]**0.5
    scores = np.where(np.tril(np.ones((T, T))), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    h = np.einsum('bnts,bsnh->btnh', weights / weights.sum(-1, keepdims=True), v).reshape(B, T, -1)
    x = x + linear(norm(h, at + 'self_attn.attn_sub_norm') if own else h, at + 'self_attn.o_proj')
    h = norm(x, at + 'post_attention_layernorm')
    gate, up = (linear(h, f'{at}mlp.{n}_proj') for n in ('gate', 'up'))
    h = (np.maximum(gate, 0)**2 if own else gate / (1 + np.exp(-gate))) * up
    x = x + linear(norm(h, at + 'mlp.ffn_sub_norm') if own else h, at + 'mlp.down_proj')
  return norm(x, 'model.norm') @ plain.get('lm_head.weight', plain['model.embed_tokens.weight']).T


@pytest.mark.parametrize(('kind', 'model_type'), [
    ('bitlinear', 'llama'), ('autobitlinear', 'bitnet'), ('online', 'llama'), *(
        pytest.param(*case, marks=pytest.mark.slow) for case in (
            ('bitlinear', 'bitnet'), ('autobitlinear', 'llama'), ('online', 'bitnet')))])
def test_logits_equal_the_equations(kind, model_type, tmp_path, mesh):
  """The largest difference is bounded only for most tokens, as an input between two codes may get either."""
  values = CONFIGS[model_type]
  plain, _ = write(tmp_path / 'in', values, kind, mesh)
  tokens = np.random.default_rng(1).integers(0, 67, (8, 8))
  with jax.set_mesh(mesh):
    model, _, params = read(tmp_path / 'in', mesh)
    assert model.cfg.einsum == ('bitnet' if kind == 'online' else 'packed')
    mine = logits_of(model, params, tokens)
  wanted = equations(values, plain, tokens)
  off = np.abs(mine - wanted).max((1, 2)) / np.abs(wanted).max()
  assert np.median(off) < 1e-5 and off.max() < LARGEST_ROUNDED


@pytest.mark.parametrize('bits', ['1.58', '1'])
def test_codes_are_those_of_training(bits):
  for std in (1.0, 1e-6):
    w = (std * np.random.default_rng(0).standard_normal((24, 36))).astype(np.float32)
    for mine, theirs in zip(quantized(w, bits), weight_codes(jnp.asarray(w), bits), strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize('kind', ['bitlinear', 'autobitlinear'])
def test_training_goes_on_from_matrices_with_the_same_codes_and_scales(kind, tmp_path, mesh):
  _, packed = write(tmp_path / 'in', CONFIGS['bitnet'], kind, mesh)
  with jax.set_mesh(mesh):
    cfg = build(MODELS.settings('decoder'), HuggingFace.model_values(tmp_path / 'in') | {'dtype': 'float32'})
    assert cfg.einsum == 'bitnet' and cfg.sections['bitnet'].out_norm
    model, _, params = read(tmp_path / 'in', mesh)
    trained = make_model(cfg)
    boxed = boxed_params(example_batch(DataConfig(seq_len=8)), model=trained)
    arrays = unpacked(params, nn.meta.unbox(boxed), param_info(boxed), True)
    for layer in range(2):
      codes, scale = packed[f'model.layers.{layer}.self_attn.q_proj.weight']
      found, own = quantized(np.asarray(arrays['blocks/attn/q/w'][layer]).reshape(32, -1), '1.58')
      np.testing.assert_array_equal(found.T, codes)
      np.testing.assert_allclose(own, scale, rtol=1e-6)
    tree = {}
    for path, x in arrays.items():
      *parts, leaf = path.split('/')
      node = tree
      for part in parts:
        node = node.setdefault(part, {})
      node[leaf] = x
    tokens = np.random.default_rng(1).integers(0, 67, (8, 8))
    with clock_at(0):
      mine, theirs = (logits_of(*pair, tokens) for pair in ((trained, tree), (model, params)))
  off = np.abs(mine - theirs).max((1, 2)) / np.abs(theirs).max()
  assert np.median(off) < 1e-5 and off.max() < LARGEST_ROUNDED


def export(folder, mesh, model_type, **settings):
  """A random run, exported; returns (its model, its parameters)."""
  online = CONFIGS[model_type] | {'quantization_config': {'quant_method': 'bitnet'} | KINDS['online']}
  cfg = dataclasses.replace(read_model(online, '')[1], dtype='float32')
  bitnet = dataclasses.replace(cfg.sections['bitnet'], **settings)
  cfg = dataclasses.replace(cfg, sections=Sections(dict(cfg.sections) | {'bitnet': bitnet}))
  model = make_model(cfg)
  params = nn.meta.unbox(model.init(jax.random.key(0), example_batch(DataConfig(seq_len=8))))['params']
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
  data = DataConfig(path='', tokenizer='none', seq_len=8)
  config = Config(model=cfg, batch_tokens=8, tokens_per_device=8, data=data)
  said = write_model(Loaded(config, None, None, model, params, {'step': 0, 'data': {}}), folder)
  assert 'in 1.58 bits, other tensors in float32;' in said
  assert 'parameters in 1.58 bits, other tensors in float32, ' in (folder / 'README.md').read_text()
  return model, params


@pytest.mark.parametrize(('bits', 'model_type'), [
    ('1.58', 'llama'), ('1', 'bitnet'), pytest.param('1.58', 'bitnet', marks=pytest.mark.slow),
    pytest.param('1', 'llama', marks=pytest.mark.slow)])
def test_a_run_is_exported_packed_and_computes_the_same(model_type, bits, tmp_path, mesh):
  with jax.set_mesh(mesh):
    trained, params = export(tmp_path / 'out', mesh, model_type, weight_bits=bits)
    written = json.loads((tmp_path / 'out/config.json').read_text())
    assert written['model_type'] == model_type
    assert written['quantization_config']['linear_class'] == (
        'bitlinear' if model_type == 'llama' else 'autobitlinear')
    assert load_file(tmp_path / 'out/model.safetensors')['model.layers.1.mlp.up_proj.weight'].shape == (12, 32)
    model, _, packed = read(tmp_path / 'out', mesh)
    tokens = np.random.default_rng(1).integers(0, 67, (8, 8))
    mine, theirs = logits_of(model, packed, tokens), logits_of(trained, params, tokens)
    off = np.abs(mine - theirs).max((1, 2)) / np.abs(theirs).max()
    assert np.median(off) < 1e-5 and off.max() < LARGEST_ROUNDED
    run = HuggingFace.read(HuggingFace.open(tmp_path / 'out', ''), tmp_path / 'out', mesh)
    write_model(run, tmp_path / 'again')  # from the packed form
  first, again = (load_file(tmp_path / name / 'model.safetensors') for name in ('out', 'again'))
  assert first.keys() == again.keys()
  for name, x in first.items():
    np.testing.assert_allclose(x, again[name], rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize(('settings', 'message'), [
    ({'activation_bits': 4}, 'config.model.bitnet.activation_bits=4'), ({'sub_norm': True}, 'bitnet.sub_norm'),
    ({'out_norm_eps': 1e-3, 'out_norm': True}, 'bitnet.out_norm'),
], ids=str)
def test_a_run_that_transformers_cannot_compute_is_refused_with_its_fields(settings, message, tmp_path, mesh):
  with pytest.raises(ConfigError, match=message), jax.set_mesh(mesh):
    export(tmp_path / 'out', mesh, 'llama', **settings)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('fields', 'message'), [
    ({'use_rms_norm': True}, 'use_rms_norm'), ({'linear_class': 'other'}, "linear_class 'other'"),
    ({'modules_to_not_convert': ['lm_head', 'down_proj']}, 'modules_to_not_convert'),
    ({'modules_to_not_convert': []}, 'modules_to_not_convert'), ({'bits': 3}, 'bits=3 is unknown'),
], ids=str)
def test_other_quantizations_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    read_model(CONFIGS['llama'] | {'quantization_config': {'quant_method': 'bitnet'} | fields}, '')
  with pytest.raises(ConfigError, match='multiplies by weight_scale'):
    read_model(CONFIGS['llama'] | {'quantization_config': {'quant_method': 'bitnet'} | KINDS['autobitlinear']}, '')
  with pytest.raises(ConfigError, match='quantization_config: absent'):
    read_model(CONFIGS['bitnet'], '')
  with pytest.raises(ConfigError, match='no BitNet of this family'):
    read_model(random_config('phi3', random.Random(0)) | {'quantization_config': {'quant_method': 'bitnet'}}, '')


def test_damaged_codes_and_scales_are_refused(tmp_path, mesh):
  write(tmp_path / 'in', CONFIGS['llama'], 'bitlinear', mesh)
  whole, path = load_file(tmp_path / 'in/model.safetensors'), tmp_path / 'in/model.safetensors'
  name = 'model.layers.1.self_attn.q_proj.weight'
  for wrong in ({name: whole[name] | 3}, {f'{name}_scale': np.zeros(1, np.float32)}):
    save_file(whole | wrong, path)
    with pytest.raises(StorageError, match=r'q_proj.weight.*damaged'):
      read(tmp_path / 'in', mesh)
  save_file(whole | {name: whole[name].astype(np.float32)}, path)
  with pytest.raises(ConfigError, match='only U8 can be read'):
    read(tmp_path / 'in', mesh)


def test_packing_keeps_the_settings_of_other_parts():
  cfg = read_model(CONFIGS['llama'] | {'quantization_config': {'quant_method': 'bitnet'} | KINDS['online']}, '')[1]
  assert packed_model(cfg, '1.58').sections['rms_norm'].eps == 1e-5
  assert packed_model(cfg, '1.58').sections['packed'] == BitNet()


@pytest.mark.skipif(not can_check('accelerate'), reason='needs torch, transformers and accelerate')
@pytest.mark.parametrize('model_type', CONFIGS)
@pytest.mark.parametrize('kind', [*KINDS, 'exported'])
def test_logits_equal_transformers(kind, model_type, tmp_path, mesh):
  tokens = np.random.default_rng(1).integers(0, 67, (8, 8))
  with jax.set_mesh(mesh):
    if kind == 'exported':
      export(tmp_path / 'in', mesh, model_type)
    else:
      write(tmp_path / 'in', CONFIGS[model_type], kind, mesh)
    model, _, params = read(tmp_path / 'in', mesh)
    mine = logits_of(model, params, tokens)
  theirs = _open(tmp_path / 'in').logits(tokens)
  off = np.abs(mine - theirs).max((1, 2)) / np.abs(theirs).max()
  print(f'{model_type} {kind}: median {np.median(off):.1e}, largest {off.max():.1e}')
  assert np.median(off) < 1e-5 and off.max() < LARGEST_ROUNDED

"""Published models in and out: logits and gradients equal those of transformers, and round trips are bit-equal."""

import dataclasses
import functools
import json
import random
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES, random_config
from goldens import FILE
from safetensors.numpy import save_file
from weights import abstract_of, write_folder

from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import by_name, path_of
from llm_jax.config import base_from
from llm_jax.hf.family import choose_family, meaning, read_model, written
from llm_jax.hf.rules import tensor_names
from llm_jax.hf.weights import DTYPES, Tensors, check_tensors, read_weights, tensors_of, write_weights
from llm_jax.infer.importers import importer_of
from llm_jax.infer.load import load_run
from llm_jax.losses.readout import cross_entropy

GOLDENS = [json.loads(line.rstrip(',\n')) for line in FILE.read_text().splitlines()[1:-1]]


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


def read(folder, mesh, **fields):
  """(model, family, its parameters) of a folder."""
  family, cfg = read_model(json.loads((folder / 'config.json').read_text()), 'config.json')
  cfg = dataclasses.replace(cfg, **fields)
  model, abstract = abstract_of(cfg, mesh)
  tensors, rules = Tensors(folder), family.rules(cfg)
  names = check_tensors(tensors, rules, cfg.num_layers, family.prefix)
  arrays = read_weights(tensors, rules, names, abstract, cfg.num_layers, cfg.vocab_size)
  return model, family, jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_of(path)], abstract)


def batch_of(tokens):
  tokens = jnp.asarray(tokens)
  mask = jnp.ones(tokens.shape).at[:, -1].set(0)
  return Batch(tokens=tokens, targets=jnp.roll(tokens, -1, 1), loss_mask=mask)


@pytest.mark.parametrize('golden', GOLDENS, ids=lambda golden: f'{golden["config"]["model_type"]}-{golden["seed"]}')
def test_logits_loss_and_gradients_equal_those_of_transformers(golden, tmp_path, mesh):
  """goldens.json holds what transformers computes of the same weights; goldens.py makes it."""
  write_folder(tmp_path, golden['config'], mesh, golden['seed'], vocab_multiple=8)
  with jax.set_mesh(mesh):
    model, family, params = read(tmp_path, mesh, vocab_multiple=8)
    batch = batch_of(golden['tokens'])
    cfg, rules = model.cfg, family.rules(model.cfg)

    def loss(params):
      readout = model.apply({'params': params}, batch, method='readout')
      loss, _ = cross_entropy(readout, batch.targets, batch.loss_mask / batch.loss_mask.sum())
      return loss, readout.logits()[:, -1, :cfg.vocab_size]

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  wanted = np.array(golden['logits'])
  np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())
  assert float(value) == pytest.approx(golden['loss'], rel=1e-5)
  norms = {name: float(np.linalg.norm(make())) for name, _, make in tensors_of(
      by_name(grads), rules, cfg.num_layers, cfg.vocab_size, 'float32')}
  assert norms == pytest.approx(golden['gradient_norms'], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('model_type', FAMILIES)
def test_round_trips_of_random_configs_are_bit_equal(model_type, tmp_path, mesh):
  seed = random.randrange(10**6)
  print('seed', seed)
  for i in range(2):
    values = random_config(model_type, random.Random(seed + i))
    folder, out = tmp_path / f'in{i}', tmp_path / f'out{i}'
    multiple = {'vocab_multiple': random.Random(i).choice([1, 16])}
    write_folder(folder, values, mesh, seed, **multiple)
    model, family, params = read(folder, mesh, **multiple)
    cfg = model.cfg
    back, differs = written(cfg, model_type)
    assert not differs
    assert meaning(read_model(back, 'written')[1]) == meaning(cfg)
    out.mkdir()
    write_weights(out, tensors_of(by_name(params), family.rules(cfg), cfg.num_layers, cfg.vocab_size, 'float32'),
                  20_000)
    assert len(list(out.glob('model-*-of-*.safetensors'))) > 1
    mine, theirs = Tensors(out), Tensors(folder)
    assert mine.files.keys() == theirs.files.keys()
    for name, rule, _ in tensor_names(family.rules(cfg), cfg.num_layers):
      sizes = {path: x.shape[1:] if rule.stacked else x.shape for path, x in by_name(params).items()
               if path in rule.paths}
      shape = rule.shape(sizes, cfg.vocab_size)
      np.testing.assert_array_equal(mine.read(name, shape), theirs.read(name, shape))


def test_files_are_written_tensor_by_tensor_with_the_bytes_of_the_library(tmp_path):
  rng, alive = np.random.default_rng(0), []
  kinds = [('b', 'F32', np.float32), ('a', 'F32', np.float32), ('c', 'U8', np.uint8), ('e', 'BF16', DTYPES['bfloat16']),
           ('d', 'F16', np.float16), ('f', 'U8', np.uint8)]
  arrays = {name: rng.integers(0, 100, (3, i + 1)).astype(dtype) for i, (name, _, dtype) in enumerate(kinds)}
  arrays['scale'] = np.ones((1,), np.float32)

  def make(name):
    assert not [ref for ref in alive if ref() is not None]
    array = arrays[name].copy()
    alive.append(weakref.ref(array))
    return array

  entries = [(name, jax.ShapeDtypeStruct(x.shape, x.dtype), functools.partial(make, name))
             for name, x in arrays.items()]
  assert write_weights(tmp_path, entries, 10**9) == sum(x.nbytes for x in arrays.values())
  save_file(arrays, tmp_path / 'library.safetensors', metadata={'format': 'pt'})
  assert (tmp_path / 'model.safetensors').read_bytes() == (tmp_path / 'library.safetensors').read_bytes()
  (tmp_path / 'model.safetensors').unlink()
  write_weights(tmp_path, entries, 10**9, writes=False)
  assert not (tmp_path / 'model.safetensors').exists()


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 1, 'fsdp': 4, 'tensor': 2}], ids=str)
def test_weights_are_the_same_on_any_mesh(tmp_path, mesh, sizes):
  values = random_config('qwen3', random.Random(7)) | {'num_key_value_heads': 2}
  write_folder(tmp_path, values, mesh)
  other = make_mesh(MeshConfig(**sizes))
  _, _, alone = read(tmp_path, mesh, vocab_multiple=8)
  _, family, spread = read(tmp_path, other, vocab_multiple=8)
  assert max(len(x.sharding.device_set) for x in jax.tree.leaves(spread)) == 8
  jax.tree.map(np.testing.assert_array_equal, alone, spread)
  cfg = dataclasses.replace(read_model(values, '')[1], vocab_multiple=8)
  for (name, _, a), (_, _, b) in zip(*(tensors_of(by_name(params), family.rules(cfg), cfg.num_layers, cfg.vocab_size,
                                                  'bfloat16') for params in (alone, spread)), strict=True):
    np.testing.assert_array_equal(a(), b(), err_msg=name)


@pytest.mark.parametrize(('fields', 'message'), [
    ({'hidden_act': 'mish'}, "hidden_act='mish'; it would fit with 'silu'"),
    ({'rope_scaling': {'rope_type': 'longrope', 'short_factor': [1.0]}}, "rope scaling 'longrope'"),
    ({'clip_qkv': 8.0}, 'clip_qkv=8.0: unknown field'),
    ({'model_type': 'lama'}, r"model_type 'lama' is no family .*did you mean 'llama'"),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantized'),
    ({'hidden_size': None}, 'hidden_size: must be a number'),
    ({'hidden_size': 10**400}, 'hidden_size: must be a number'),
    ({'num_hidden_layers': 2.5}, 'num_hidden_layers: must be a whole number'),
    ({'tie_word_embeddings': 'false'}, 'tie_word_embeddings: must be true or false'),
    ({'hidden_act': ['silu']}, 'hidden_act'),
    ({'rope_scaling': 'linear'}, 'rope_scaling: must be a section'),
    ({'rope_scaling': {'rope_type': 'linear'}}, 'factor must be a number'),
    ({'text_config': {'model_type': 'llama'}}, 'reads more than text'),
    ({'num_attention_heads': 5, 'head_dim': None}, 'multiple of num_attention_heads 5'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_a_model_that_no_family_fits_is_refused_with_its_fields(fields, message):
  with pytest.raises(ConfigError, match=message):
    read_model(random_config('llama', random.Random(1)) | {'rope_scaling': None} | fields, 'config.json')


def test_a_config_of_ours_that_no_family_fits_is_refused_with_its_fields(mesh):
  cfg = read_model(random_config('llama', random.Random(1)), '')[1]
  assert choose_family(cfg)[0] == 'llama'
  for fields, message in (({'logit_soft_cap': 2.0, 'attention_sinks': True}, 'attention_sinks'),
                          ({'parallel_residual': True}, 'parallel_residual'),
                          ({'prefix_attention': True}, 'prefix_attention')):
    with pytest.raises(ConfigError, match=message):
      choose_family(dataclasses.replace(cfg, **fields))


def test_damaged_and_pickled_weights_are_refused(tmp_path, mesh):
  values = random_config('llama', random.Random(3))
  write_folder(tmp_path / 'a', values, mesh)
  (tmp_path / 'a/config.json').write_text(json.dumps(values | {'intermediate_size': 40}))
  with pytest.raises(StorageError, match=r'mlp.*by config.json it must be'):
    read(tmp_path / 'a', mesh)
  (tmp_path / 'a/config.json').write_text(json.dumps(values | {'num_hidden_layers': values['num_hidden_layers'] + 1}))
  with pytest.raises(StorageError, match='lacks'):
    read(tmp_path / 'a', mesh)
  (tmp_path / 'a/config.json').write_text(json.dumps(values | {'num_hidden_layers': 1}))
  with pytest.raises(StorageError, match='also has'):
    read(tmp_path / 'a', mesh)
  path = tmp_path / 'a/model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(StorageError, match='damaged'):
    read(tmp_path / 'a', mesh)
  path.rename(tmp_path / 'a/pytorch_model.bin')
  with pytest.raises(StorageError, match=r'pickles .*safetensors'):
    read(tmp_path / 'a', mesh)


def test_a_stored_readout_that_differs_from_the_tied_embedding_is_refused(tmp_path, mesh):
  values = random_config('llama', random.Random(4)) | {'tie_word_embeddings': False}
  write_folder(tmp_path, values, mesh)
  (tmp_path / 'config.json').write_text(json.dumps(values | {'tie_word_embeddings': True}))
  with pytest.raises(StorageError, match='tie_word_embeddings'):
    load_run(tmp_path, mesh)


@pytest.mark.parametrize('model_type', ['gemma2', 'gemma3_text'])
def test_gemma_without_sliding_layers_is_written_with_a_window(model_type):
  """transformers does not load one without."""
  values = random_config(model_type, random.Random(0))
  values['layer_types'] = ['full_attention'] * values['num_hidden_layers']
  back, differs = written(read_model(values, '')[1], model_type)
  assert not differs and back['sliding_window'] > 0


@pytest.mark.parametrize(('model_type', 'field'), [
    ('mistral', 'attention_bias'), ('phi3', 'attention_bias'), ('mistral', 'mlp_bias'), ('phi3', 'mlp_bias'),
    ('qwen2', 'mlp_bias'), ('qwen3', 'mlp_bias'), ('olmo2', 'mlp_bias')])
def test_biases_that_a_class_of_transformers_does_not_have_are_refused(model_type, field):
  """It leaves such tensors out and computes something else."""
  values = random_config(model_type, random.Random(4))
  assert read_model(values | {field: False}, '')[1] == read_model(values, '')[1]
  with pytest.raises(ConfigError, match=f'{field}=True: unknown field'):
    read_model(values | {field: True}, '')
  ours = {'attention_bias': {'qkv_bias': True, 'out_bias': True}, 'mlp_bias': {'mlp_bias': True}}[field]
  _, differs = written(dataclasses.replace(read_model(values, '')[1], **ours), model_type)
  assert differs.keys() == ours.keys()


def test_biases_by_use_bias_are_those_of_llama():
  cfg = read_model(random_config('llama', random.Random(1)) | {'attention_bias': False, 'mlp_bias': False}, '')[1]
  biased = dataclasses.replace(cfg, use_bias=True, qkv_bias=None, out_bias=None, mlp_bias=None)
  kind, values = choose_family(biased)
  assert kind == 'llama' and values['attention_bias'] and values['mlp_bias']


@pytest.mark.parametrize('model_type', ['llama', 'gemma2', 'gemma3_text'])
def test_a_width_that_transformers_refuses_is_not_written(model_type):
  """Their classes want heads to divide the width even where head_dim is set; Mistral's does not."""
  values = random_config(model_type, random.Random(2)) | {'hidden_size': 32}
  cfg = dataclasses.replace(read_model(values, '')[1], num_heads=3, num_kv_heads=1, head_dim=8)
  assert written(cfg, model_type)[1]
  with pytest.raises(ConfigError, match='multiple of num_attention_heads 3'):
    read_model(values | {'num_attention_heads': 3, 'num_key_value_heads': 1, 'head_dim': 8}, '')


def test_a_llama_of_another_width_is_written_as_mistral():
  values = random_config('llama', random.Random(2)) | {'hidden_size': 32, 'attention_bias': False, 'mlp_bias': False}
  cfg = dataclasses.replace(read_model(values, '')[1], num_heads=3, num_kv_heads=1, head_dim=8)
  assert choose_family(cfg)[0] == 'mistral'


@pytest.mark.parametrize(('model_type', 'fits'), [('gemma', True), ('gemma2', False), ('gemma3_text', False)])
def test_gelu_is_the_approximation_in_gemma_1_alone(model_type, fits):
  values = random_config(model_type, random.Random(2))
  values |= {'hidden_act' if fits else 'hidden_activation': 'gelu'}
  if fits:
    assert read_model(values, '')[1].mlp == 'geglu'
  else:
    with pytest.raises(ConfigError, match="hidden_activation='gelu'"):
      read_model(values, '')


@pytest.mark.parametrize(('model_type', 'length'), [('llama', 2048), ('gemma2', 8192), ('qwen3', 32768),
                                                    ('mistral', 131072), ('starcoder2', 4096)])
def test_a_scaling_without_a_length_has_that_of_its_family(model_type, length):
  values = random_config(model_type, random.Random(1)) | {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0}}
  del values['max_position_embeddings']
  assert read_model(values, '')[1].layers[0].rope.scaling.original_max_len == length


def test_a_share_of_a_head_below_one_pair_is_refused():
  values = random_config('phi3', random.Random(1)) | {'head_dim': 2, 'partial_rotary_factor': 0.25}
  with pytest.raises(ConfigError, match='rope_dim must be at least 1'):
    read_model(values, '')


def test_dynamic_scaling_of_one_pair_is_refused():
  values = random_config('llama', random.Random(1)) | {'rope_theta': 1e4, 'rope_scaling': {
      'rope_type': 'dynamic', 'factor': 2.0}}
  with pytest.raises(ConfigError, match='at least 4 rotated features'):
    read_model(values | {'head_dim': 2}, '')


def test_a_scaling_that_no_layer_has_is_left_out():
  values = random_config('gemma3_text', random.Random(2)) | {
      'num_hidden_layers': 2, 'layer_types': ['sliding_attention'] * 2, 'rope_theta': 1e6,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}
  assert [layer.rope.base for layer in read_model(values, '')[1].layers] == [100.0]


# Fields of published models that transformers does not read.
@pytest.mark.parametrize(('model_type', 'fields'), [
    ('smollm3', {'max_window_layers': 28}),
    ('starcoder2', {'attention_softmax_in_fp32': True, 'scale_attn_weights': True}),
    ('gemma2', {'sliding_window_size': 4096}), ('gpt2', {'predict_special_tokens': True, 'output_past': True}),
    ('llama', {'max_sequence_length': 2048, 'gradient_checkpointing': True, 'temperature': 0.6}),
    ('mistral', {'num_key_value_heads': None})])
def test_fields_without_effect_are_not_in_the_way(model_type, fields):
  values = random_config(model_type, random.Random(8))
  cfg = read_model(values | fields, '')[1]
  expected = read_model(values, '')[1]
  assert cfg == (dataclasses.replace(expected, num_kv_heads=4) if 'num_key_value_heads' in fields else expected)


def test_a_missing_shard_is_named(tmp_path, mesh):
  write_folder(tmp_path, random_config('gpt2', random.Random(3)), mesh)
  (tmp_path / 'model.safetensors').rename(tmp_path / 'model-00001-of-00002.safetensors')
  index = {'weight_map': {'transformer.wte.weight': 'model-00001-of-00002.safetensors',
                          'transformer.wpe.weight': '../model-00002-of-00002.safetensors'}}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(StorageError, match='model-00002-of-00002'):
    Tensors(tmp_path)


def test_a_folder_is_opened_like_a_run(tmp_path, mesh):
  write_folder(tmp_path, random_config('llama', random.Random(5)), mesh)
  assert importer_of(tmp_path) is not None
  with jax.set_mesh(mesh):
    run = load_run(tmp_path, mesh)
  assert run.tokenizer is None and run.config.model.vocab_size == 67
  with pytest.raises(ConfigError, match='--checkpoint'):
    load_run(tmp_path, mesh, 'best')


def test_base_from_has_the_config_of_the_folder(tmp_path, mesh):
  write_folder(tmp_path, random_config('gemma2', random.Random(5)), mesh)
  config = base_from(str(tmp_path))
  assert config.model.norm_position == 'both' and config.model.rms_norm.offset
  assert config.start.run == str(tmp_path) and config.data.tokenizer == 'none'
  with pytest.raises(ConfigError, match='no folder of a published model'):
    base_from(str(Path(__file__).parent))

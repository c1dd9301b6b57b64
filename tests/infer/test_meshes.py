"""Evaluation, generation and export give the same on any mesh, with parameters and caches in shards."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from program import ROOT, environment, finish, write_config
from safetensors.numpy import load_file

from llm_jax import api, main
from llm_jax.base import target
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import by_name
from llm_jax.commands import evaluate, export, generate
from llm_jax.extras.commands import inspect_run
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.infer import mesh as meshes
from llm_jax.infer import sampling
from llm_jax.infer.load import load_run, open_run
from llm_jax.infer.trained import Trained

MESHES = ['data=1,fsdp=8', 'fsdp=2,tensor=2', 'context=2,tensor=2', 'stage=2,fsdp=2', *(
    pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
        'data=8', 'fsdp=8', 'tensor=4', 'fsdp=4,tensor=2', 'tensor=-1', 'context=2', 'stage=2'))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A run that was trained over fsdp=4 and tensor=2."""
  folder = tmp_path_factory.mktemp('meshes')
  write_config(folder)
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/run', '--config.num_steps=20', '--config.eval.every=20',
             '--config.model.num_heads=8', '--config.model.num_kv_heads=8', '--config.model.embed_dim=64',
             '--config.model.dtype=float32', '--config.eval.sample_tokens=0', '--config.mesh.fsdp=4',
             '--config.mesh.tensor=2', "--config.mesh.rules=('vocab=none', 'act_vocab=none')"])
  return folder


@pytest.fixture(scope='module')
def one(folder):
  """What one device computes."""
  run = load_run(folder / 'run', make_mesh(MeshConfig(), jax.devices()[:1]))
  return results(Trained(run, folder / 'run'))


def results(trained):
  """(loss, greedy tokens of two samples, beam search, sampled tokens of eight)."""
  return (trained.validate()['loss'], rows(trained, num_samples=2, temperature=0), rows(trained, num_beams=3),
          rows(trained, num_samples=8, seed=1))


def rows(trained, **options):
  return np.stack(list(trained.tokens('def ', num_tokens=12, **options)), axis=1)


@pytest.mark.parametrize('sizes', MESHES)
def test_any_mesh_gives_what_one_device_gives(folder, one, sizes):
  trained = api.load(folder / 'run', mesh=sizes)
  loss, *tokens = results(trained)
  assert loss == pytest.approx(one[0], rel=1e-5)
  for found, expected in zip(tokens, one[1:], strict=True):
    np.testing.assert_array_equal(found, expected)


def test_without_a_flag_the_mesh_is_the_runs_and_parameters_are_in_shards(folder, capsys):
  trained = api.load(folder / 'run')
  assert dict(trained.mesh.shape) | {'data': 1, 'fsdp': 4, 'tensor': 2} == dict(trained.mesh.shape)
  assert "mesh: fsdp 4 x tensor 2" in (said := capsys.readouterr().err) and "(the run's;" in said
  params = by_name(trained.run.params)
  assert shard(params['blocks/mlp/up/w']) == params['blocks/mlp/up/w'].size // 8
  layer = trained._variables['layers']['blocks'][0]['params']
  assert shard(layer['mlp']['up']['w']) == layer['mlp']['up']['w'].size // 8, 'also while text is generated'


def shard(x):
  return x.addressable_shards[0].data.size


def test_the_cache_is_in_shards(folder):
  trained = api.load(folder / 'run', mesh='fsdp=4,tensor=2')
  model, prompts = trained.run.model, np.full((4, 4), 5, np.int32)
  with trained.on_mesh():
    _, cache = sampling._prefill(trained._variables, prompts, np.full(4, 4, np.int32), jax.random.key(0), model=model,
                                 num_slots=8, temperature=None, top_k=0, top_p=None, num_ids=None)
    tokens, cache = sampling._decode(trained._variables, np.full(4, 1, np.int32), cache, jax.random.key(0), model=model,
                                     temperature=None, top_k=0, top_p=None, num_ids=None)
    larger = sampling._grow(cache, model=model, num_slots=16)
  for each in (cache, larger):
    k = each['layers'][1]['k']
    assert shard(k) == k.size // 8, k.sharding
  assert tokens.is_fully_replicated


@pytest.mark.parametrize('sizes', ['data=1,fsdp=8', 'data=1,fsdp=4,tensor=2'])
def test_no_weights_are_gathered_for_a_token(folder, sizes):
  trained = api.load(folder / 'run', mesh=sizes)
  prompts, options = np.full((1, 4), 5, np.int32), {'temperature': None, 'top_k': 0, 'top_p': None, 'num_ids': None}
  model, variables, key = trained.run.model, trained._variables, jax.random.key(0)
  with trained.on_mesh():
    _, cache = sampling._prefill(variables, prompts, np.full(1, 4, np.int32), key, model=model, num_slots=8, **options)
    compiled = sampling._decode.lower(variables, np.full(1, 1, np.int32), cache, key, model=model, **options).compile()
  found = read_collectives(compiled.as_text(), dict(trained.mesh.shape))
  sent = sum(each.wire_bytes * each.executions for each in found)
  assert sent < 0.1 * sum(x.nbytes for x in jax.tree.leaves(trained.run.params)), found


def test_the_mesh_is_chosen_so_that_the_weights_fit(folder, monkeypatch):
  run = open_run(folder / 'run')
  size = sum(x.nbytes for x in jax.tree.leaves(api.load(folder / 'run').run.params))
  wide = run.config.__class__(**{**vars(run.config), 'mesh': MeshConfig()})
  other = type(run)(wide, run.tokenizer, run.encoder_tokenizer)

  def chosen(run, memory):
    monkeypatch.setattr(target, 'device_memory', lambda device: memory)
    config = meshes.choose_mesh(run)[0]
    return config.data, config.fsdp, config.tensor

  assert chosen(run, None) == (-1, 4, 2) and chosen(run, size) == (-1, 4, 2)
  assert chosen(other, None) == (-1, 1, 1) and chosen(other, 2 * size) == (-1, 1, 1)
  assert chosen(other, 2 * size - 1) == (1, -1, 1)
  odd = run.config.__class__(**{**vars(run.config), 'mesh': MeshConfig(data=3)})
  assert chosen(type(run)(odd, run.tokenizer, run.encoder_tokenizer), None) == (-1, 1, 1), 'it does not fit 8 devices'


@pytest.mark.parametrize(('text', 'message'), [
    ('fsdp=3', 'does not cover the 8 device'), ('4,2', 'must be like fsdp=4,tensor=2'), ('heads=2', 'must be like'),
    ('fsdp=-1,tensor=-1', 'at most one -1'), ('fsdp=0', '--mesh: .*must be positive'),
    ('tensor=8,data=1,fsdp=1', None), ('tensor=16', 'does not cover'), ('stage=8', '^--mesh=stage=8: .*divide')])
def test_a_mesh_that_does_not_fit_is_reported(folder, text, message):
  if message is None:
    api.load(folder / 'run', mesh=text)
    return
  with pytest.raises(ConfigError, match=message):
    api.load(folder / 'run', mesh=text)


def test_exports_of_shards_are_the_same(folder, tmp_path, capsys):
  for sizes in ('data=8', 'fsdp=4,tensor=2'):
    for bits in ('32', '1.58'):
      export.main([f'--workdir={folder}/run', f'--out={tmp_path}/{sizes}_{bits}', f'--weight_bits={bits}',
                   f'--mesh={sizes}'])
  for bits in ('32', '1.58'):
    whole, sharded = (load_file(tmp_path / f'{sizes}_{bits}' / 'model.safetensors') for sizes in (
        'data=8', 'fsdp=4,tensor=2'))
    assert whole.keys() == sharded.keys()
    for name, x in whole.items():
      np.testing.assert_allclose(sharded[name], x, rtol=1e-6)
  trained = api.load(tmp_path / 'fsdp=4,tensor=2_32', mesh='fsdp=8')
  params = by_name(trained.run.params)
  np.testing.assert_array_equal(params['embed/w'], whole_params(folder)['embed/w'])
  assert shard(params['blocks/attn/q/w']) == params['blocks/attn/q/w'].size // 8


def whole_params(folder):
  return by_name(api.load(folder / 'run', mesh='data=8').run.params)


@pytest.mark.slow
def test_inspect_on_shards_is_the_same(folder, tmp_path):
  for sizes in ('data=8', 'fsdp=4,tensor=2'):
    inspect_run.main([f'--workdir={folder}/run', f'--out={tmp_path}/{sizes}.png', f'--mesh={sizes}'])
  one, other = (json.loads((tmp_path / f'{sizes}.json').read_text()) for sizes in ('data=8', 'fsdp=4,tensor=2'))
  assert one['activations'].keys() == other['activations'].keys()
  for kind in ('weights', 'activations'):
    for name in one[kind]:
      assert one[kind][name]['rms'] == pytest.approx(other[kind][name]['rms'], rel=1e-4), name


def launch(folder, *words):
  """What a command prints as two processes with two devices each."""
  process = subprocess.Popen(
      [sys.executable, ROOT / 'launch' / 'local.py', '--num_processes=2', '--devices=2', '--', *words], cwd=folder,
      env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return finish(process)


@pytest.mark.slow
def test_two_processes_evaluate(folder, one, tmp_path):
  printed = launch(folder, 'evaluate', 'run', '--mesh=fsdp=4', f'--out={tmp_path}/evaluation.json')
  assert printed.count('"loss"') == 1, printed[:1500]
  assert json.loads((tmp_path / 'evaluation.json').read_text())['loss'] == pytest.approx(one[0], rel=1e-5)


def test_two_processes_generate(folder, capsys):
  options = ['--prompt=def ', '--num_tokens=12', '--temperature=0', '--mesh=fsdp=2,tensor=2']
  printed = launch(folder, 'generate', 'run', *options)
  capsys.readouterr()
  generate.main([f'--workdir={folder}/run', *options[:3]])
  alone = capsys.readouterr().out
  assert re.sub(r'^(processes|distributed:|mesh:|\d|\[Gloo\]).*\n', '', printed, flags=re.MULTILINE) == alone


@pytest.mark.slow
def test_two_processes_export(folder, tmp_path):
  launch(folder, 'export', 'run', f'--out={tmp_path}/exported', '--weight_bits=32', '--mesh=fsdp=4')
  arrays, params = load_file(tmp_path / 'exported' / 'model.safetensors'), whole_params(folder)
  assert arrays.keys() == params.keys()
  for name, x in arrays.items():
    np.testing.assert_array_equal(x, params[name])
  evaluate.main([f'--workdir={tmp_path}/exported', '--mesh=fsdp=8'])

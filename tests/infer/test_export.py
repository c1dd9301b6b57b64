"""Exported models: packed at two bits, loaded like a run, with equal results."""

import json
import shutil

import numpy as np
import pytest
from program import write_config
from safetensors.numpy import load_file

from llm_jax import main
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.commands import evaluate, export, generate


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export')
  write_config(folder)
  train(folder, 'bitnet')
  return folder


def train(folder, einsum, num_steps=15):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/{einsum}', f'--config.model.einsum={einsum}',
             f'--config.num_steps={num_steps}', f'--config.eval.every={num_steps}', '--config.eval.sample_tokens=0',
             '--config.model.num_layers=1'])
  export.main([f'--workdir={folder}/{einsum}', f'--out={folder}/{einsum}_packed'])


def loss(workdir, capsys):
  capsys.readouterr()
  evaluate.main([f'--workdir={workdir}'])
  printed = capsys.readouterr().out
  return json.loads(printed[printed.index('{\n'):])['loss']


def test_an_exported_model_computes_the_same(folder, capsys):
  trained = loss(folder / 'bitnet', capsys)
  assert loss(folder / 'bitnet_packed', capsys) == pytest.approx(trained, abs=1e-4)
  generate.main([f'--workdir={folder}/bitnet_packed', '--prompt=def ', '--num_tokens=4', '--temperature=0'])
  packed = capsys.readouterr().out
  generate.main([f'--workdir={folder}/bitnet', '--prompt=def ', '--num_tokens=4', '--temperature=0'])
  assert packed == capsys.readouterr().out


def test_packed_matrices_take_two_bits_per_weight(folder, capsys, tmp_path):
  export.main([f'--workdir={folder}/bitnet', f'--out={tmp_path}/new'])
  table = {line.split('  ')[0].strip(): line for line in capsys.readouterr().out.splitlines()}
  arrays = load_file(tmp_path / 'new' / 'model.safetensors')
  for name, x in load_file(folder / 'bitnet_packed' / 'model.safetensors').items():
    np.testing.assert_array_equal(arrays[name], x)
  packed = sum(x.size for name, x in arrays.items() if name.endswith('/packed'))
  assert f'{4 * packed:,}' in table['matrices'] and 2 <= float(table['matrices'].split()[-3]) < 2.2
  assert 'together' in table and arrays['embed/w'].dtype == np.float32


def test_an_unpacked_export_equals_the_run(folder, capsys):
  export.main([f'--workdir={folder}/bitnet', f'--out={folder}/whole', '--weight_bits=32'])
  printed = capsys.readouterr().out
  assert '32.00 bits each' in printed.splitlines()[-2] and 'matrices' not in printed, 'nothing is packed'
  modes = {path.name: path.stat().st_mode for path in (folder / 'whole').iterdir()}
  assert modes['model.safetensors'] == modes['config.json'], 'the umask applies to all files'
  assert loss(folder / 'whole', capsys) == loss(folder / 'bitnet', capsys)


@pytest.mark.slow
@pytest.mark.parametrize(('einsum', 'off'), [('bitnet', 1e-4), ('full', 0.02)])
def test_training_can_start_from_an_export(folder, capsys, einsum, off):
  """As BitNet it computes the same at first; in full precision its activations are not rounded."""
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/on_{einsum}', f'--config.model.einsum={einsum}',
             f'--config.start.run={folder}/bitnet_packed', '--config.num_steps=1', '--config.model.num_layers=1',
             f'--config.data.tokenizer={folder}/bitnet/tokenizer.json', '--config.eval.sample_tokens=0',
             '--config.optim.learning_rate=1e-9'])
  assert 'not found, so initialized' not in capsys.readouterr().out
  assert loss(folder / f'on_{einsum}', capsys) == pytest.approx(loss(folder / 'bitnet', capsys), abs=off)


@pytest.mark.slow
def test_packing_a_full_precision_run_worsens_its_loss(folder, capsys):
  train(folder, 'full', num_steps=100)
  assert loss(folder / 'full_packed', capsys) > loss(folder / 'full', capsys)


def test_invalid_exports_are_reported(folder, tmp_path):
  with pytest.raises(ConfigError, match=r'--out: .*bitnet already exists'):
    export.main([f'--workdir={folder}/bitnet', f'--out={folder}/bitnet'])
  with pytest.raises(ConfigError, match='cannot be packed'):
    export.main([f'--workdir={folder}/bitnet_packed', f'--out={tmp_path}/x'])
  with pytest.raises(ConfigError, match='packed is inference-only'):
    main.main([f'--config={folder}/tiny.py', f'--workdir={tmp_path}/y', '--config.model.einsum=packed'])
  shutil.copytree(folder / 'bitnet_packed', tmp_path / 'damaged')
  path = tmp_path / 'damaged' / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(StorageError, match=r'model\.safetensors: damaged'):
    evaluate.main([f'--workdir={tmp_path}/damaged'])

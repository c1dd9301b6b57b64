"""llm-jax selfcheck: a run passes on two devices, a broken kernel of a plug-in is found, and nothing is written."""

import os
import re

import jax
import numpy as np
import pytest
from program import finish, start, write_config

from llm_jax import main
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.commands import export
from llm_jax.extras import selfcheck
from llm_jax.extras.commands import selfcheck as command
from llm_jax.infer.load import load_run

BROKEN = '''
from llm_jax.base.registry import NoSettings, register
from llm_jax.layers.kernels import ATTENTION, xla

def shifted(q, k, v, window, segment_ids, prefix):
  return xla(q, k, v, max(1, window or q.shape[1] // 2), segment_ids, prefix)  # forgets the first half

def failing(q, k, v, window, segment_ids, prefix):
  raise RuntimeError('no such symbol')

register(ATTENTION, 'shifted', shifted, NoSettings)
register(ATTENTION, 'failing', failing, NoSettings)
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a tiny run whose data are gone."""
  folder = tmp_path_factory.mktemp('selfcheck')
  main.main([f'--config={write_config(folder)}', f'--workdir={folder / "run"}', '--config.num_steps=2',
             '--config.eval.every=0', '--config.mesh.data=2', '--config.mesh.fsdp=4', '--config.model.dtype=float32'])
  for path in (folder / 'corpus').iterdir():
    path.unlink()
  return folder


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def results(printed):
  return {line[:46].strip(): line[47:].split()[0] for line in printed.splitlines()
          if re.search(r' (OK|DIFFERENCE|left out) ', line)}


def test_a_run_passes_on_two_devices_without_its_data_and_is_left_as_it_was(folder):
  before = contents(folder / 'run')
  plugin = folder / 'broken.py'
  plugin.write_text(BROKEN)
  shown = finish(start(folder, 'selfcheck', f'--workdir={folder / "run"}', '--mesh=data=1', f'--plugin={plugin}'),
                 code=os.EX_SOFTWARE)
  assert contents(folder / 'run') == before
  found = results(shown)
  assert found.pop('attention shifted and xla, float32') == found.pop('attention failing and xla, float32') == (
      'DIFFERENCE')
  assert set(found.values()) == {'OK', 'left'} and found['cached decoding and the full forward pass'] == 'OK'
  assert 'RuntimeError: no such symbol' in shown and '2 of the checks failed: attention shifted' in shown


@pytest.mark.slow  # the run of two devices passes the same checks
def test_meshes_microbatches_and_an_exported_model(folder, capsys):
  export.main([f'--workdir={folder / "run"}', f'--out={folder / "exported"}', '--weight_bits=32'])
  capsys.readouterr()
  command.main([f'--workdir={folder / "exported"}', '--mesh=data=1,tensor=2'])
  found = results(capsys.readouterr().out)
  assert found['one device and the mesh tensor 2'] == found['1, 2 and 4 microbatches'] == 'OK'
  assert found['save and resume, bit for bit'] == 'OK' and found['attention splash and xla'] == 'left'


def loaded(folder):
  single = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(single):
    return load_run(folder / 'run', single)


def test_a_wrong_cache_a_wrong_mesh_and_lost_bits_are_found(folder, monkeypatch):
  run = loaded(folder)
  setup = selfcheck.set_up(run)
  assert setup.config.model.dropout == 0 and run.config.model.dropout > 0
  with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
    decode = type(setup.model).decode
    monkeypatch.setattr(type(setup.model), 'decode', lambda self, tokens, cache: decode(
        self, tokens, cache | {'length_B': cache['length_B'] - 1}))  # writes over the newest slot
    assert not selfcheck.guarded('x', setup.limit, lambda: selfcheck.check_decoding(setup)).passed
    monkeypatch.undo()

  features = selfcheck.make_rows(setup, 4)
  steps = selfcheck.Steps(setup, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), features)
  restore = selfcheck.Checkpoints.restore

  def lossy(self, *trees):
    params, kept, meta = restore(self, *trees)
    return jax.tree.map(lambda x: x.at[(0,) * x.ndim].multiply(1 + 1e-6), params), kept, meta

  monkeypatch.setattr(selfcheck.Checkpoints, 'restore', lossy)
  assert steps.check_resume() > 0


def test_numbers_that_are_not_finite_do_not_pass():
  assert not selfcheck.guarded('x', 1.0, lambda: selfcheck.relative([1.0, 2.0], [1.0, np.nan])).passed
  assert selfcheck.guarded('x', 1e-6, lambda: selfcheck.relative([1.0, 2.0], [1.0, 2.0])).result == 'OK'
  assert selfcheck.guarded('x', 1e-6, lambda: 'why').result == 'left out'


@pytest.mark.parametrize(('text', 'words'), [
    ('data=0', 'must be positive'), ('rows=2', "must be like fsdp=4,tensor=2, .*; got 'rows=2'"),
    ('data=16', 'needs 16 devices'), ('data=-1', 'without -1'), ('data', "; got 'data'")])
def test_a_mesh_that_cannot_be_is_refused(text, words):
  with pytest.raises(ConfigError, match=words):
    selfcheck.parse_mesh(text)
  assert selfcheck.parse_mesh('tensor=2,data=4') == MeshConfig(4, 1, 2)

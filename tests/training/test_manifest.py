"""Damage to the files of a checkpoint is found, whatever the file and the damage, and an older step is used."""

import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import DivergedError, StorageError
from llm_jax.base.files import MANIFEST, saved_steps
from llm_jax.base.seal import seal, unseal
from llm_jax.config import CheckpointConfig
from llm_jax.training import manifest
from llm_jax.training.checkpoint import Checkpoints
from llm_jax.training.manifest import damage


def tree(step):
  w = np.random.default_rng(step).standard_normal((16, 8)).astype(np.float32)
  return {'a': {'w': jnp.asarray(w)}, 'b': jnp.zeros(4, 'bfloat16')}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(checkpoints, step, params=None):
  return checkpoints.save(step, params or tree(step), (jnp.int32(step), tree(step + 1)), {'position': {'rows': step}})


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('manifest') / 'checkpoints'
  with Checkpoints(folder, CheckpointConfig(keep_last=3)) as checkpoints:
    for step in (1, 2, 3):
      save(checkpoints, step)
      checkpoints.record(step, 1.0 / step, 0, {'val/loss': 1.0 / step})
    assert checkpoints.wait()
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def flip(path, rng):
  content = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(content))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


FAULTS = {
    'bit': lambda path, other, rng: flip(path, rng),
    'truncated': lambda path, other, rng: path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)]),
    'empty': lambda path, other, rng: path.write_bytes(b''),
    'deleted': lambda path, other, rng: path.unlink(),
    'zeroed': lambda path, other, rng: path.write_bytes(bytes(path.stat().st_size)),
    'of another step': lambda path, other, rng: path.write_bytes(other.read_bytes()),
    'longer': lambda path, other, rng: path.write_bytes(path.read_bytes() + b'\0'),
}


def files_of(step):
  return sorted(path for path in step.rglob('*') if path.is_file())


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_in_any_file_of_a_step_is_found_by_name(fault, folder, saved):
  seed = time.time_ns() % 2**32
  rng = random.Random(seed)
  print(f'seed {seed}')
  others = [path.read_bytes() for path in files_of(folder / '2')]
  for path in files_of(folder / '3'):
    content = path.read_bytes()
    other = rng.choice([p for p in files_of(folder / '2') if p.read_bytes() != content])
    for _ in range(10 if fault == 'bit' else 1):
      FAULTS[fault](path, other, rng)
      [problem] = damage(folder / '3')
      assert problem.startswith(path.relative_to(folder / '3').as_posix() + ': '), problem
      path.unlink(missing_ok=True)
      path.write_bytes(content)
  assert not damage(folder / '3') and others == [path.read_bytes() for path in files_of(folder / '2')]


def test_a_step_in_the_place_of_another_is_found(folder):
  shutil.rmtree(folder / '3')
  shutil.copytree(folder / '2', folder / '3')
  assert damage(folder / '3') == [f'{MANIFEST}: is of step 2']


def test_a_sealed_value_proves_every_bit():
  values = {'a': 1, 'b': {'c': 'x"y\n'}, 'hash': 'own'}
  content = seal(values)
  assert unseal(content) == values
  for bit in range(8 * len(content)):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError):
      unseal(bytes(changed))


def data_file(step):
  return max((path for path in files_of(step / 'params') if path.parent.name == 'd'), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize('read_only', [True, False])
def test_a_damaged_step_is_reported_set_aside_and_an_older_one_is_restored(read_only, folder, capsys):
  flip(data_file(folder / '3'), random.Random(1))
  (folder / '2' / MANIFEST).unlink()
  with Checkpoints(folder, CheckpointConfig(), read_only=read_only) as checkpoints:
    params, _, meta = checkpoints.restore(abstract(tree(1)))
    jax.tree.map(np.testing.assert_array_equal, params, tree(1))
    assert meta['step'] == 1 and data_file(folder / '3').name in capsys.readouterr().err
    if not read_only:
      checkpoints.set_aside_after(1)
      assert sorted(path.name.split('-')[0] for path in folder.iterdir()) == [
          '1', '1.score.json', '2.corrupt', '3.corrupt']
      assert save(checkpoints, 2) and checkpoints.wait()
  assert saved_steps(folder) == ([1, 3] if read_only else [1, 2])


def test_only_damaged_steps_are_an_error_that_names_the_way_out(folder):
  for step in (1, 2, 3):
    data_file(folder / str(step)).write_bytes(b'')
  with Checkpoints(folder, CheckpointConfig()) as checkpoints, pytest.raises(StorageError) as e:
    checkpoints.restore(abstract(tree(1)))
  assert '--start_over' in str(e.value) and all(f'step {step}: params/' in str(e.value) for step in (1, 2, 3))
  assert saved_steps(folder) == [1, 2, 3], 'a message, and nothing is moved'


def test_damage_to_a_score_loses_the_score_alone(folder, capsys):
  flip(folder / '3.score.json', random.Random(1))
  with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
    assert checkpoints.best_step() == 2 and 'score of step 3 is lost' in capsys.readouterr().err
    assert checkpoints.restore(abstract(tree(3)))[2]['step'] == 3


def test_what_a_killed_save_leaves_does_not_count_and_is_removed(folder):
  """Killed while Orbax writes, before the manifest, before the last rename, and while an old step is deleted."""
  (folder / '3').rename(folder / '3.unfinished')
  shutil.copytree(folder / '2', folder / '4.unfinished')
  (folder / '4.unfinished' / MANIFEST).unlink()
  (folder / '5.unfinished.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    assert checkpoints.steps() == [1, 2] and not list(folder.glob('*.unfinished*'))


def test_bytes_that_change_on_their_way_to_the_disk_are_found_after_the_save(tmp_path, monkeypatch, capsys):
  real = manifest.write_manifest

  def write(folder, values):
    real(folder, values)
    flip(data_file(folder), random.Random(1))

  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    save(checkpoints, 1)
    assert checkpoints.wait()
    monkeypatch.setattr(manifest, 'write_manifest', write)
    save(checkpoints, 2)
    assert not checkpoints.wait() and checkpoints.steps() == [1]
    assert list(tmp_path.glob('2.corrupt-*')) and 'other bytes than were written' in capsys.readouterr().err
    monkeypatch.undo()
    assert save(checkpoints, 2) and checkpoints.wait() and checkpoints.steps() == [1, 2]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_neither_saved_nor_restored(value, tmp_path, monkeypatch, capsys):
  bad = tree(2) | {'b': tree(2)['b'].at[3].set(value)}
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    save(checkpoints, 1)
    with pytest.raises(DivergedError, match='params/b: not finite at step 2'):
      save(checkpoints, 2, bad)
    assert checkpoints.wait() and checkpoints.steps() == [1]
    monkeypatch.setattr('llm_jax.training.checkpoint.non_finite', lambda tree: [])  # as if written by something else
    save(checkpoints, 2, bad)
    assert checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.restore(abstract(tree(1)))[2]['step'] == 1
    assert 'step 2: params/b: not finite' in capsys.readouterr().err


def test_an_infinite_scalar_is_a_best_value_so_far(tmp_path):
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    assert checkpoints.save(1, tree(1), {'best': jnp.float32(np.inf)}, {}) and checkpoints.wait()
    with pytest.raises(DivergedError, match='opt_state/best'):
      checkpoints.save(2, tree(1), {'best': jnp.float32(np.nan)}, {})

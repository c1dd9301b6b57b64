"""The wheel and the locks: what a user gets who has no checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from program import ROOT, environment

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wheel')
  subprocess.run([sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', folder], cwd=ROOT, check=True,
                 capture_output=True)
  [path] = folder.glob('llm_jax-*.whl')
  return path


def test_the_wheel_has_presets_types_and_license(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  presets = {f'llm_jax/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
  assert presets <= set(names) and {'llm_jax/py.typed', 'llm_jax/extras/serving/page.html'} <= set(names)
  info = next(name for name in names if name.endswith('/METADATA')).rpartition('/')[0]
  metadata = zipfile.ZipFile(wheel).read(f'{info}/METADATA').decode()
  assert 'License-Expression: Apache-2.0' in metadata and f'{info}/licenses/LICENSE' in names
  assert 'llm-jax = llm_jax.__main__:run' in zipfile.ZipFile(wheel).read(f'{info}/entry_points.txt').decode()
  assert not [name for name in names if name.startswith(('tests', 'benchmarks'))]


def test_an_installed_wheel_finds_its_presets_in_an_empty_folder(wheel, tmp_path):
  target, empty = tmp_path / 'site', tmp_path / 'empty'
  empty.mkdir()
  zipfile.ZipFile(wheel).extractall(target)  # what pip does with a pure wheel
  env = environment(tmp_path) | {'PYTHONPATH': str(target)}

  def run(*arguments):
    done = subprocess.run([sys.executable, '-m', *arguments], cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  found = run('llm_jax', 'configs')
  assert all(path.stem in found for path in (ROOT / 'configs').glob('*.py'))
  assert 'num_layers = 4' in run('llm_jax', 'config', '--config=configs/gpt_small.py', 'model')
  where = subprocess.run([sys.executable, '-c', 'import llm_jax; print(llm_jax.__file__)'], cwd=empty, env=env,
                         capture_output=True, text=True).stdout
  assert where.startswith(str(target))
  assert not os.listdir(empty)


@pytest.mark.parametrize(('lock', 'extras'), [
    ('requirements.lock', ['test', 'data', 'quant', 'wgsl']),
    ('requirements-cuda.lock', ['test', 'data', 'quant', 'wgsl', 'cloud', 'cuda13']),
    ('requirements-tpu.lock', ['build', 'data', 'cloud', 'tpu'])])
def test_locks_pin_every_requirement_by_hash_and_name_no_address(lock, extras):
  text = (ROOT / lock).read_text()
  assert '://' not in text
  pinned = {re.sub(r'[-_.]+', '-', name).lower() for name in re.findall(r'^([A-Za-z0-9_.-]+)==', text, re.M)}
  wanted = PROJECT['dependencies'] + [line for extra in extras for line in PROJECT['optional-dependencies'][extra]]
  names = {re.sub(r'[-_.]+', '-', re.match(r'[A-Za-z0-9_.-]+', line)[0]).lower() for line in wanted} - {'llm-jax'}
  assert names <= pinned, names - pinned
  assert all('--hash=sha256:' in block for block in re.split(r'^(?=\S)', text, flags=re.M) if '==' in block)
  if 'cuda13' in extras:
    assert {'jax-cuda13-plugin', 'jax-cuda13-pjrt'} <= pinned
  assert ('libtpu' in pinned) == ('tpu' in extras)

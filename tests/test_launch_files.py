"""The files of launch/: each is described, and checked by the tools for its kind where they are installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT

from llm_jax.base import errors

LAUNCH = ROOT / 'launch'
README = (LAUNCH / 'README.md').read_text()
FILES = sorted(path.name for path in LAUNCH.iterdir() if path.is_file() and path.name != 'README.md')


def tool(name):
  """The path of a program that `make lint-launch` installs; skips the test without it."""
  path = shutil.which(name, path=f'{Path(sys.executable).parent}:{ROOT / ".venv-launch" / "bin"}') or shutil.which(name)
  return path or pytest.skip(f'{name} is not installed; make lint-launch installs it')


@pytest.mark.parametrize('name', FILES)
def test_each_file_has_a_section_of_the_readme(name):
  """What it does, one command, what it needs, how failures go, and how it was tried."""
  found = re.search(rf'^## {re.escape(name)}\n(.*?)(?=^## |\Z)', README, re.M | re.S)
  assert found, f'no section {name}'
  assert re.search(r'^```\n.+?^```', found[1], re.M | re.S), 'a command'
  assert all(f'**{word}' in found[1] for word in ('Needs', 'Failures', 'Tried')), name


def test_the_readme_describes_no_file_that_is_gone():
  assert set(re.findall(r'^## ([\w.]+\.\w+|Dockerfile)$', README, re.M)) == set(FILES)


@pytest.mark.parametrize('name', [name for name in FILES if name.endswith(('.sh', '.sbatch'))])
def test_shell_scripts_pass_shellcheck(name):
  done = subprocess.run([tool('shellcheck'), LAUNCH / name], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_the_service_knows_the_exit_codes():
  service = (LAUNCH / 'llm_jax.service').read_text()
  again, final = (set(map(int, re.search(rf'^{name}=(.*)', service, re.M)[1].split()))
                  for name in ('RestartForceExitStatus', 'RestartPreventExitStatus'))
  kinds = [errors.ConfigError, errors.DataError, errors.StorageError, errors.DivergedError, errors.LostError,
           errors.Interrupted]
  assert again | final == {kind.exit_code for kind in kinds} and not again & final

"""The files of launch/: each is described, and checked by the tools for its kind where they are installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from program import ROOT

from llm_jax import main
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


CODES = {kind.exit_code for kind in (errors.ConfigError, errors.DataError, errors.StorageError, errors.DivergedError,
                                     errors.LostError, errors.Interrupted)}
FINAL = CODES - {errors.LostError.exit_code, errors.Interrupted.exit_code}


def test_the_service_knows_the_exit_codes():
  service = (LAUNCH / 'llm_jax.service').read_text()
  again, final = (set(map(int, re.search(rf'^{name}=(.*)', service, re.M)[1].split()))
                  for name in ('RestartForceExitStatus', 'RestartPreventExitStatus'))
  assert again | final == CODES and not again & final


JOBSETS = ['jobset_tpu.yaml', 'jobset_gpu.yaml']


def replicated_job(name):
  [job] = yaml.safe_load((LAUNCH / name).read_text())['spec']['replicatedJobs']
  return job


@pytest.mark.parametrize('name', JOBSETS)
def test_jobs_of_a_jobset_fit_the_schema_of_kubernetes(name, tmp_path):
  path = tmp_path / 'job.yaml'
  path.write_text(yaml.safe_dump({'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'job'},
                                  **replicated_job(name)['template']}))
  check = [tool('kubernetes-validate'), '--strict', path]
  done = subprocess.run(check, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  path.write_text(path.read_text().replace('backoffLimit', 'backofLimit'))
  assert subprocess.run(check, capture_output=True).returncode != 0, 'the check finds a wrong name'


@pytest.mark.parametrize('name', JOBSETS)
def test_a_jobset_ends_at_the_final_codes_and_restarts_at_others(name):
  spec, job = yaml.safe_load((LAUNCH / name).read_text())['spec'], replicated_job(name)['template']['spec']
  [rule] = job['podFailurePolicy']['rules']
  assert rule == {'action': 'FailJob', 'onExitCodes': {
      'containerName': 'main', 'operator': 'In', 'values': sorted(FINAL)}}
  assert [(r['action'], r['onJobFailureReasons']) for r in spec['failurePolicy']['rules']] == [
      ('FailJobSet', ['PodFailurePolicy'])]
  assert spec['failurePolicy']['maxRestarts'] > 0 == job['backoffLimit'] and spec['network']['enableDNSHostnames']
  assert job['template']['spec']['restartPolicy'] == 'Never', 'which a podFailurePolicy needs'


@pytest.mark.parametrize('name', JOBSETS)
def test_processes_of_a_jobset_are_counted_and_started_with_flags_that_exist(name):
  job = replicated_job(name)
  spec = job['template']['spec']
  [container] = spec['template']['spec']['containers']
  assert spec['parallelism'] == spec['completions'] and container['name'] == 'main'
  variables = {variable['name']: variable.get('value') for variable in container['env']}
  assert variables.get('JAX_NUM_PROCESSES', str(job['replicas'] * spec['parallelism'])) == str(
      job['replicas'] * spec['parallelism'])
  command, *flags = container['args']
  args = main.parser().parse(flags)
  assert command == 'train' and args.distributed == 'on'
  mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
  assert mounts.keys() == {volume['name'] for volume in spec['template']['spec']['volumes']}
  assert args.workdir.startswith(mounts['shared']) and variables['LLM_JAX_CACHE'].startswith(mounts['shared'])
  assert mounts['shm'] == '/dev/shm'


def paths(value, path=''):
  """(path, value) of each leaf; a list's items by their name, if they have one."""
  if isinstance(value, list):
    value = {item['name'] if isinstance(item, dict) and 'name' in item else i: item for i, item in enumerate(value)}
  if not isinstance(value, dict):
    return {(path, value)}
  return set().union(*(paths(item, f'{path}/{name}') for name, item in value.items()))


def test_jobsets_for_tpus_and_gpus_differ_in_devices_and_processes_alone():
  tpu, gpu = (paths(yaml.safe_load((LAUNCH / name).read_text().replace('name: nodes', 'name: slice')))
              for name in JOBSETS)
  differ = {path.partition('/slice/template/spec/')[2] or path for path, _ in tpu ^ gpu}
  kinds = ('parallelism', 'completions', '/metadata/annotations/', *(f'template/spec/{name}' for name in (
      'nodeSelector', 'tolerations', *(f'containers/main/{name}' for name in ('image', 'env', 'ports', 'resources')))))
  assert not [path for path in differ if not path.startswith(kinds)]


DOCKERFILE = (LAUNCH / 'Dockerfile').read_text()


def test_the_dockerfile_passes_hadolint():
  done = subprocess.run([tool('hadolint'), LAUNCH / 'Dockerfile'], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_images_have_three_targets_of_one_user_and_what_they_copy_exists():
  targets = {stage: base for base, stage in re.findall(r'^FROM (\S+) AS (\S+)$', DOCKERFILE, re.M) if base == 'user'}
  assert targets.keys() == {'cpu', 'cuda', 'tpu'} and 'USER 1000' in DOCKERFILE.partition(' AS user')[2]
  assert not re.search('^USER', DOCKERFILE.partition(' AS user')[0], re.M)
  ignored = [line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')]
  for line in re.findall(r'^COPY (?!--)(.*) \S+$', DOCKERFILE, re.M):
    for name in line.split():
      assert (ROOT / name).exists() and any(Path(name).match(pattern) for pattern in ignored), name
  locks = re.findall(r'--require-hashes -r (\S+)', DOCKERFILE)
  assert locks == ['requirements.lock', 'requirements-cuda.lock', 'requirements-tpu.lock']
  assert all(re.search('^hatchling==', (ROOT / lock).read_text(), re.M) for lock in locks), 'without build isolation'


def test_the_package_is_made_from_what_the_images_copy(tmp_path):
  """The last RUN of each stage, with the files that it has there."""
  build = tmp_path / 'build'
  build.mkdir()
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, build)
  for name in ('configs', 'llm_jax'):
    shutil.copytree(ROOT / name, build / name, ignore=shutil.ignore_patterns('__pycache__'))
  subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps',
                  '--no-build-isolation', f'--target={tmp_path / "installed"}', '.'], cwd=build, check=True)
  assert (tmp_path / 'installed/llm_jax/configs/gpt_small.py').is_file()
  assert (tmp_path / 'installed/bin/llm-jax').is_file()

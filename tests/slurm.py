"""A stand-in for SLURM on this machine: sbatch, srun and scontrol as programs of a folder, with their real interfaces.

sbatch runs a copy of the script, as SLURM does, and again as long as the script asks for it; srun starts the tasks as
processes here and writes their output to files; both note their arguments.
"""

import os
import subprocess
import sys
from pathlib import Path

SBATCH = '''
import json, os, pathlib, re, shutil, subprocess, sys
state = pathlib.Path(os.environ['STUB'])
own = sys.argv[1:]
script = next(i for i, word in enumerate(own) if not word.startswith('-'))
directives = re.findall(r'^#SBATCH --([a-z-]+)(?:=(.*))?$', pathlib.Path(own[script]).read_text(), re.M)
options = dict(directives) | dict(word[2:].partition('=')[::2] for word in own[:script])
(state / 'options').write_text(json.dumps(options))
spooled = state / 'spool' / 'slurm_script'  # without the folder of the original
spooled.parent.mkdir(exist_ok=True)
shutil.copy(own[script], spooled)
(state / 'command').write_text(' '.join([os.path.abspath(own[script]), *own[script + 1:]]))
name = options['job-name']
log = options['output'].replace('%x', name).replace('%j', '4242')
for start in range(30):
  count = {'SLURM_RESTART_COUNT': str(start)} if start else {}
  env = os.environ | count | {
      'SLURM_JOB_ID': '4242', 'SLURM_JOB_NAME': name, 'SLURM_SUBMIT_DIR': os.getcwd(),
      'SLURM_JOB_NODELIST': '127.0.0.1', 'SLURM_NTASKS': os.environ.get('STUB_NTASKS', '1')}
  with open(log, 'a' if options['open-mode'] == 'append' else 'w') as out:
    code = subprocess.run(['bash', spooled, *own[script + 1:]], env=env, stdout=out, stderr=out).returncode
  if not (state / 'requeue').exists():
    break
  (state / 'requeue').unlink()
sys.exit(code)
'''

SRUN = '''
import json, os, pathlib, subprocess, sys
state = pathlib.Path(os.environ['STUB'])
command = next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith('-'))
options = dict(word[2:].partition('=')[::2] for word in sys.argv[1:command])
with open(state / 'srun', 'a') as f:
  kept = ('NCCL_', 'FI_', 'LD_LIBRARY_PATH')
  variables = {name: value for name, value in os.environ.items() if name.startswith(kept)}
  f.write(json.dumps([options, sys.argv[command:], variables]) + chr(10))
tasks = []
for rank in range(int(os.environ['SLURM_NTASKS'])):
  env = os.environ | {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank), 'SLURM_STEP_NODELIST': '127.0.0.1',
                      'SLURM_STEP_NUM_NODES': '1', 'SLURM_STEP_ID': '0',
                      'SLURM_STEP_NUM_TASKS': os.environ['SLURM_NTASKS']}
  out = open(options['output'].replace('%t', str(rank)), 'a' if options['open-mode'] == 'append' else 'w')
  tasks.append(subprocess.Popen(sys.argv[command:], env=env, stdout=out, stderr=out))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
'''

SCONTROL = '''
import os, pathlib, sys
state = pathlib.Path(os.environ['STUB'])
if sys.argv[1:] == ['show', 'job', '4242']:
  print('JobId=4242 JobName=llm_jax', 'UserId=me(1000)', 'Command=' + (state / 'command').read_text(), 'WorkDir=/',
        sep='\\n   ')
elif sys.argv[1:] == ['requeue', '4242']:
  (state / 'requeue').touch()
else:
  sys.exit(1)
'''


def install(folder: Path) -> dict[str, str]:
  """Writes the programs to folder/bin; returns the variables of the environment that has them."""
  (folder / 'bin').mkdir()
  for name, code in (('sbatch', SBATCH), ('srun', SRUN), ('scontrol', SCONTROL)):
    path = folder / 'bin' / name
    path.write_text(f'#!{sys.executable}\n{code}')
    path.chmod(0o755)
  return {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'STUB': str(folder)}


def sbatch(script: Path, *flags: str, cwd: Path, env: dict[str, str], options: tuple[str, ...] = ()) -> int:
  """Submits the script and waits for its job; returns the exit code."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith(('SLURM_', 'NCCL_', 'FI_', 'JAX_'))}
  return subprocess.run(['sbatch', *options, str(script), *flags], cwd=cwd, env=kept | env, timeout=240).returncode

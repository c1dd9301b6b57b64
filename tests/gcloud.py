"""A stand-in for gcloud: a slice of two hosts, which are folders here; commands for hosts run with these as HOME."""

import os
import subprocess
import sys
from pathlib import Path

GCLOUD = '''
import json, os, pathlib, shutil, subprocess, sys, time
state = pathlib.Path(os.environ['STUB'])
words = sys.argv[1:]
with open(state / 'calls', 'a') as f:
  f.write(json.dumps(words) + chr(10))
words = words[:words.index('--')] if '--' in words else words
options = dict(word[2:].partition('=')[::2] for word in words if word.startswith('--'))
kind, verb, *names = [word for word in words if not word.startswith('--')][2:]
assert words[:2] == ['compute', 'tpus'] and options['zone'] == 'us-x1', words
slice_, request = state / 'slice', state / 'request'
hosts = [state / 'host0', state / 'host1']

def script(name):
  """The next word of a file, which the last one of stays."""
  path = state / name
  first, *rest = path.read_text().split() if path.exists() else ['']
  if rest:
    path.write_text(' '.join(rest))
  return first

def new_hosts():
  for host in hosts:
    uv = host / '.local/bin/uv'
    uv.parent.mkdir(parents=True)
    uv.write_text(os.environ['STUB_UV'])
    uv.chmod(0o755)
  slice_.write_text('READY')

def remove_hosts():
  for host in hosts:
    subprocess.run(['tmux', 'kill-server'], env=os.environ | {'TMUX_TMPDIR': str(host)}, stderr=subprocess.DEVNULL)
    for _ in range(50):  # a process that is about to end may still write a file
      shutil.rmtree(host, ignore_errors=True)
      if not host.exists():
        break
      time.sleep(0.1)
  slice_.unlink()

def on(host, command):
  env = os.environ | {'HOME': str(host), 'TMUX_TMPDIR': str(host)}
  env.pop('TMUX', None)
  return subprocess.Popen(['bash', '-c', command], cwd=host, env=env)

if verb == 'describe':
  path = slice_ if kind == 'tpu-vm' else request
  looks = state / 'preempted_after'  # so many looks at the slice, once
  if kind == 'tpu-vm' and slice_.exists() and looks.exists():
    looks.write_text(str(int(looks.read_text()) - 1))
    if looks.read_text() == '0':
      looks.unlink()
      slice_.write_text('PREEMPTED')
  if not path.exists():
    sys.exit(1)
  print(path.read_text())
elif verb == 'create':
  said = script('creates')
  if said not in ('', 'ok'):
    sys.exit('ERROR: (gcloud.compute.tpus.tpu-vm.create) ' + said)
  new_hosts()
  if kind == 'queued-resources':
    request.write_text('ACTIVE')
elif verb == 'delete':
  remove_hosts()
  request.unlink(missing_ok=True)
elif not slice_.exists() or slice_.read_text() != 'READY':
  sys.exit(255)
elif verb == 'scp':
  for host in hosts:
    shutil.copy(names[0], host)
elif 'command' in options:
  chosen = hosts if options['worker'] == 'all' else [hosts[int(options['worker'])]]
  sys.exit(max([p.wait() for p in [on(host, options['command']) for host in chosen]]))
'''

# Notes its calls; makes a Python that runs launch/supervise.py, but exits with the words of the file `codes` for a run.
UV = '''#!/bin/bash
echo "$@" >> ~/uv
if [ "$1" = venv ]; then
  mkdir -p .venv/bin
  cp "$STUB/python" .venv/bin/python
fi
'''

PYTHON = '''
import json, os, pathlib, signal, sys, time
if sys.argv[1] != '-m':
  os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
home, state = pathlib.Path.home(), pathlib.Path(os.environ['STUB'])
with open(home / 'runs', 'a') as f:
  f.write(json.dumps([sys.argv[1:], os.environ.get('MY_SETTING')]) + chr(10))
with open(state / f'runs_{home.name}', 'a') as f:
  f.write('started' + chr(10))
count = len((state / f'runs_{home.name}').read_text().split())
code = ((state / 'codes').read_text().split() + ['wait'] * 50)[count - 1]
if code == 'wait':
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
  time.sleep(300)
sys.exit(int(code))
'''


def install(folder: Path) -> dict[str, str]:
  """Writes the program to folder/bin; returns the variables of the environment that has it."""
  (folder / 'bin').mkdir()
  for path, code in ((folder / 'bin' / 'gcloud', GCLOUD), (folder / 'python', PYTHON)):
    path.write_text(f'#!{sys.executable}\n{code}')
    path.chmod(0o755)
  return {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'STUB': str(folder), 'STUB_UV': UV, 'LLM_JAX_POLL': '1'}


def remove(folder: Path) -> None:
  """Ends what runs on the hosts."""
  for host in ('host0', 'host1'):
    subprocess.run(['tmux', 'kill-server'], env=os.environ | {'TMUX_TMPDIR': str(folder / host)},
                   stderr=subprocess.DEVNULL, check=False)

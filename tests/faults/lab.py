"""A folder with a tiny config, its undisturbed runs, and trials that must end with the same bits as these."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from faults.processes import LIMIT, ROOT, Program, Server, free_address, rank_environment

STEPS, SAVES, EVALS = 40, 10, 20  # steps of a run, between saves, between evaluations
NAMES = ('step', 'train/loss', 'train/grad_norm', 'val/loss')  # compared bit for bit
SAVING = ('*.orbax-checkpoint-tmp*', '*.unfinished*')  # folders of checkpoints that are being written

CONFIG = '''"""A run of a second."""
from llm_jax.config import base

def get_config():
  config = base()
  config.plugins = ({plugin!r},)
  config.num_steps = {steps}
  config.batch_tokens = 128
  config.tokens_per_device = 128
  config.model.num_layers = 2
  config.model.embed_dim = 16
  config.model.num_heads = 2
  config.model.dropout = 0.1
  config.model.dtype = 'float32'
  config.data.path = {text!r}
  config.data.tokenizer = 'byte'
  config.data.val_fraction = 0.1
  config.data.seq_len = 16
  config.optim.learning_rate = 3e-3
  config.optim.schedule = 'constant'  # so that runs of different lengths share a compiled program
  config.eval.every = {evals}
  config.eval.max_tokens = 512
  config.eval.sample_tokens = 0
  config.checkpoint.every = {saves}
  config.log.every = 1
  config.log.callbacks = ('pace',)
{more}  return config
'''
POISONED = '''  config.model.norm = 'poisoned'
  config.optim.chain = ('skip_spikes', 'clip_by_global_norm', 'adamw', 'poisoned_update')
  config.optim.skip_spikes.window = 8  # the shortest one, as a run has few steps
  config.optim.skip_spikes.threshold = 20.0
  config.optim.groups = {'poison': {'pattern': 'poison_', 'frozen': True}}
'''


class Reference(NamedTuple):
  """What an undisturbed run leaves."""

  lines: list[dict[str, float]]
  final: str  # hash of the last checkpoint's arrays
  workdir: Path


class Job:
  """A run of one or more ranks."""

  def __init__(self, programs: list[Program], workdir: Path):
    self.programs, self.workdir, self.started = programs, workdir, time.monotonic()

  def wait(self, seconds: float = LIMIT) -> list[int | None]:
    end = time.monotonic() + seconds
    return [program.wait(max(0.0, end - time.monotonic())) for program in self.programs]

  def running(self) -> bool:
    return any(program.poll() is None for program in self.programs)

  def signal(self, number: int) -> None:
    for program in self.programs:
      program.signal(number)

  def end(self) -> None:
    for program in self.programs:
      program.end()

  def text(self) -> str:
    return '\n'.join(program.text() for program in self.programs)

  def until(self, condition: Callable[[], Any], seconds: float = LIMIT) -> bool:
    """Waits for a condition; False if the job ends or the time is over before it holds."""
    end = time.monotonic() + seconds
    while not (held := bool(condition())) and self.running() and time.monotonic() < end:
      time.sleep(0.002)
    return held


class Lab:
  """The means of a campaign. A context manager, which ends the server; `rng` is the only source of random choices."""

  def __init__(self, folder: Path, seed: int):
    self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'text.txt').write_bytes((ROOT / 'llm_jax' / 'config.py').read_bytes()[:12_000])
    for name, more in (('tiny', ''), ('poisoned', POISONED)):
      (folder / f'{name}.py').write_text(CONFIG.format(
          plugin=str(Path(__file__).with_name('plugin.py')), text=str(folder / 'text.txt'), steps=STEPS, saves=SAVES,
          evals=EVALS, more=more))
    self.server = Server(folder / 'cache')
    self._count, self._references = 0, dict[tuple[int, str], Reference]()

  def __enter__(self) -> Lab:
    return self

  def __exit__(self, *exc: object) -> None:
    self.server.__exit__(*exc)

  def new(self, name: str) -> Path:
    """The folder of a new run."""
    self._count += 1
    return self.folder / f'{name}{self._count}'

  def copy(self, run: Path, name: str) -> Path:
    """A copy of a run's folder, to damage it."""
    target = self.new(name)
    shutil.copytree(run, target, symlinks=True)
    return target

  def program(self, *argv: str, devices: int = 1, env: dict[str, str] | None = None, faults: dict | None = None,
              function: str = 'faults.child:llm_jax') -> Program:
    """Starts a command of llm-jax."""
    self._count += 1
    variables = {**(env or {}), 'FAULTS': json.dumps(faults or {})}
    return Program(self.server, list(argv), cwd=self.folder, output=self.folder / f'output{self._count}.txt',
                   env=variables, devices=devices, function=function)

  def start(self, workdir: Path, *flags: str, ranks: int = 1, devices: int = 1, faults: dict | None = None,
            config: str = 'tiny') -> Job:
    """Starts a run in a folder, or resumes it."""
    argv = ('train', f'--config={self.folder}/{config}.py', f'--workdir={workdir}', *flags)
    if ranks == 1:
      return Job([self.program(*argv, devices=devices, faults=faults)], workdir)
    address = free_address()
    return Job([self.program(*argv, '--distributed', devices=devices, faults=faults,
                             env=rank_environment(rank, ranks, address)) for rank in range(ranks)], workdir)

  def reference(self, devices: int = 1, config: str = 'tiny') -> Reference:
    """An undisturbed run of one process; the first call trains it."""
    if (devices, config) in self._references:
      return self._references[devices, config]
    workdir = self.folder / f'reference_{config}_{devices}'
    job = self.start(workdir, devices=devices, config=config)
    if job.wait() != [0]:
      raise RuntimeError(f'the undisturbed run failed:\n{job.text()[-4000:]}')
    found = Reference(metrics_of(workdir), arrays_hash(workdir, STEPS), workdir)
    self._references[devices, config] = found
    return found

  def usual_seconds(self) -> float:
    """The duration of an undisturbed run whose programs have been compiled."""
    self.reference()
    job = self.start(self.new('timed'))
    job.wait()
    return time.monotonic() - job.started

  def interrupted(self) -> Path:
    """A run that was killed at step 25 or later, with checkpoints of steps 10 and 20; the first call makes it."""
    workdir = self.folder / 'interrupted'
    if not workdir.exists():
      self.reference()
      job = self.start(workdir, faults={'pace': 0.05})
      if not job.until(lambda: last_step(workdir) >= 25 and 20 in saved_steps(workdir) and not is_saving(workdir)):
        raise RuntimeError(f'the run did not reach step 25:\n{job.text()[-4000:]}')
      job.end()
    return workdir

  def differences(self, workdir: Path, devices: int = 1, config: str = 'tiny') -> str:
    """How a finished run differs from the undisturbed one; '' if no bit does."""
    wanted, lines = self.reference(devices, config), metrics_of(workdir)
    if lines != wanted.lines:
      odd = [(a, b) for a, b in zip(lines, wanted.lines, strict=False) if a != b]
      return f'{len(lines)} lines of metrics, {len(wanted.lines)} wanted; first difference: {odd[:1]}'
    found = arrays_hash(workdir, STEPS)
    return '' if found == wanted.final else 'the arrays of the last checkpoint differ'

  def finish(self, workdir: Path, *flags: str, ranks: int = 1, devices: int = 1) -> str:
    """Resumes a run to its end. Returns what is wrong: an exit code other than 0, or a difference; '' if nothing."""
    job = self.start(workdir, *flags, ranks=ranks, devices=devices)
    codes = job.wait()
    job.end()
    if codes != [0] * ranks:
      return f'exit codes {codes} when resumed: {last_lines(job.text())}'
    return self.differences(workdir, ranks * devices)


def metrics_of(workdir: Path) -> list[dict[str, float]]:
  """The compared values of each complete line of metrics.jsonl; JSON keeps all bits of a float."""
  found = []
  if (path := workdir / 'metrics.jsonl').exists():
    for line in path.read_bytes().split(b'\n')[:-1]:
      values = json.loads(line)
      found.append({name: values[name] for name in NAMES if name in values})
  return found


def last_step(workdir: Path) -> int:
  """The last step in metrics.jsonl; 0 if there is none."""
  with open(workdir / 'metrics.jsonl', 'rb') if (workdir / 'metrics.jsonl').exists() else open(os.devnull, 'rb') as f:
    found = re.findall(rb'"step": (\d+),[^\n]*\n', f.read())
  return int(found[-1]) if found else 0


def saved_steps(workdir: Path) -> list[int]:
  """The steps whose folder has its final name."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit())


def is_saving(workdir: Path) -> bool:
  """Whether a checkpoint is being written."""
  return any(path for pattern in SAVING for path in (workdir / 'checkpoints').glob(pattern))


def resumed_from(text: str) -> int:
  """The step that a program's output says it resumes from; 0 for a new run."""
  found = re.findall(r'resuming from step (\d+)', text)
  return int(found[-1]) if found else 0


def item_arrays(folder: Path) -> Any:
  """The tree of a checkpoint's item, as NumPy arrays on whatever devices they were saved."""
  import jax
  import orbax.checkpoint as ocp
  logging.getLogger('absl').setLevel(logging.ERROR)
  handler = ocp.PyTreeCheckpointer()
  tree = handler.metadata(folder.absolute()).item_metadata.tree
  return handler.restore(folder.absolute(), restore_args=jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))


def arrays_of(step: Path) -> dict[str, np.ndarray]:
  """All arrays of a checkpoint by path."""
  import jax
  return {f'{item}{jax.tree_util.keystr(path)}': np.asarray(leaf) for item in ('params', 'opt_state')
          for path, leaf in jax.tree_util.tree_leaves_with_path(item_arrays(step / item))}


def arrays_hash(workdir: Path, step: int) -> str:
  digest = hashlib.sha256()
  for name, array in sorted(arrays_of(workdir / 'checkpoints' / str(step)).items()):
    digest.update(f'{name} {array.dtype} {array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def last_lines(text: str, num: int = 6) -> str:
  return ' | '.join(text.strip().splitlines()[-num:])[-900:]


def has_traceback(text: str) -> bool:
  return 'Traceback (most recent call last)' in text

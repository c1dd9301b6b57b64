"""What llm_jax does on one GPU, in sections: peaks, attention, steps beside PyTorch, single changes, decoding, a run.

  python -m benchmarks.gpu --out=benchmarks/results/gpu.json            # all sections, about 8 minutes
  python -m benchmarks.gpu --sections=steps,decode --torch=/path/to/python

Each section is a process with a time limit that prints one JSON line per measurement; the file is written after each
line, so a section that fails or is stopped keeps what it measured. --toy runs the same code, but tiny, on any device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import MEAN_DOCUMENT, PRESETS, Preset, emit, times
from benchmarks.gpu_attention import attention
from llm_jax.base.fields import DTYPES

LIMITS = {'peaks': 60, 'steps': 200, 'attention': 120, 'profile': 90, 'changes': 200, 'large': 120, 'decode': 100,
          'run': 180}  # seconds
ENV = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}  # two processes share the card


def peaks(toy: bool) -> None:
  """The rate of a large bfloat16 product, and of a copy on the device."""
  import jax
  import jax.numpy as jnp
  n = 256 if toy else 8192
  x, y = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
  product = jax.jit(jnp.matmul)
  emit(what='product', n=n, tflops=2e-12 * n**3 / statistics.median(times(lambda: product(x, y))),
       device=jax.devices()[0].device_kind, jax=jax.__version__)
  big = jnp.ones(2**20 if toy else 2**30, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  emit(what='copy', gb_per_s=2e-9 * big.nbytes / statistics.median(times(lambda: copy(big))))


class Server:
  """A step in another process, asked for its times on demand (see common.serve)."""

  def __init__(self, python: str, module: str, flags: list[str]):
    self.log = tempfile.TemporaryFile('w+')  # noqa: SIM115
    self.process = subprocess.Popen([python, '-m', module, '--serve', *flags], text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=self.log, env=os.environ | ENV)
    self.about: dict[str, Any] = {}
    self.reader = threading.Thread(target=self._start)
    self.reader.start()

  def _start(self) -> None:
    self.about = self.read() or {}

  def read(self) -> Any:
    assert self.process.stdout
    for line in self.process.stdout:
      if line[0] in '[{':
        return json.loads(line)
    self.log.seek(0)
    return {'error': self.log.read()[-1500:]}

  def ask(self, seconds: float) -> list[float]:
    assert self.process.stdin
    self.process.stdin.write(f'step {seconds}\n')
    self.process.stdin.flush()
    return self.read()


def steps(toy: bool, torch: str) -> None:
  """Whole steps beside torch.compile, in turn, without and with documents."""
  preset, batch = ('char_tiny', 4) if toy else ('gpt2', 32)
  shape = [f'--preset={preset}', f'--batch={batch}']
  ours, theirs = (sys.executable, 'benchmarks.step'), (torch, 'benchmarks.torch_step')
  compiled = ['--dtype=f32'] if toy else ['--compile', '--dtype=bf16', '--device=cuda']
  documents = f'--documents={20 if toy else MEAN_DOCUMENT}'
  servers = {'llm_jax, documents': Server(*ours, [*shape, documents]),
             'llm_jax': Server(*ours, shape), 'torch': Server(*theirs, [*shape, *compiled])}
  if not toy:  # flex_attention has no backward pass on a CPU
    servers['torch, documents'] = Server(*theirs, [*shape, *compiled, documents])
  for name, server in servers.items():
    server.reader.join()
    emit(what='start', name=name, **server.about)
  running = {name: s for name, s in servers.items() if 'tokens' in s.about}
  seconds: dict[str, list[list[float]]] = {name: [] for name in running}
  for number in range(4):
    for name, server in running.items():
      found = server.ask(0.5 if toy else 2.5)
      if number:  # the first round warms up
        seconds[name].append(found)
  for name, rounds in seconds.items():
    about, ms = running[name].about, 1e3 * statistics.median(s for found in rounds for s in found)
    emit(what='step', name=name, ms=round(ms, 2), rounds_ms=[round(1e3 * statistics.median(r), 2) for r in rounds],
         tokens_per_s=round(1e3 * about['tokens'] / ms), tflops=round(1e-9 * about['flops'] / ms, 1),
         gb=about.get('gb_needed'))
  for server in servers.values():
    server.process.kill()


@contextlib.contextmanager
def select_update() -> Iterator[None]:
  """Computes the update always and selects its result, instead of branching."""
  import jax
  import jax.numpy as jnp

  def select(accepted: Any, update: Any, keep: Any, *args: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, accepted), update(*args), keep(*args))

  with mock.patch('llm_jax.optim.guard.jax.lax.cond', select):
    yield


def changes(toy: bool) -> None:
  """The step with documents, with one thing changed at a time."""
  preset, batch = (PRESETS['char_tiny'], 4) if toy else (PRESETS['gpt2'], 32)
  wide = dict.fromkeys(DTYPES[1:3], 'float32')

  def chunk(num_bytes: int) -> Any:
    return mock.patch.dict('llm_jax.losses.readout.CHUNK_BYTES', dict.fromkeys(('cpu', 'gpu', 'tpu'), num_bytes))

  no = contextlib.nullcontext
  base = {'scan_unroll': preset.num_layers}
  variants: list[tuple[str, Any, int, dict]] = [
      ('as it is', no, batch, base),
      ('products in float32', no, batch, base | wide),
      ('products and stream in float32', no, batch, base | dict.fromkeys(DTYPES[1:], 'float32')),
      ('scan, not unrolled', no, batch, {'scan_unroll': 1}),
      ('chunks of 128 MiB', lambda: chunk(2**27), batch, base),
      ('chunks of 512 MiB', lambda: chunk(2**29), batch, base),
      ('one chunk', lambda: chunk(2**40), batch, base),
      ('select, not cond', select_update, batch, base),
      ('attention blocked', no, batch, base | {'attention': 'blocked'}),
      ('half the rows', no, batch // 2, base),
      ('twice the rows', no, 2 * batch, base),
  ]
  time_variants(preset, variants, 20 if toy else MEAN_DOCUMENT, toy)


def large(toy: bool) -> None:
  """A model of a billion parameters."""
  preset = PRESETS['char_tiny' if toy else 'gpt_1b']
  no = contextlib.nullcontext
  time_variants(preset, [
      ('1B, 8 rows', no, 8, {'scan_unroll': 1}),
      ('1B, 16 rows', no, 16, {'scan_unroll': 1}),
      ('1B, 32 rows, save_matmuls', no, 32, {'scan_unroll': 1, 'remat': 'save_matmuls'})], 0, toy)


def time_variants(preset: Preset, variants: list[tuple[str, Any, int, dict]], documents: int, toy: bool) -> None:
  """Compiles and times each variant (name, context to trace in, rows, model fields) beside the first, in turn."""
  from benchmarks.step import build
  first = None
  for name, context, rows, fields in variants:
    try:
      with context():
        step = build(preset, rows, documents, dtype='bfloat16', **fields)
      loss, _, _ = (step.call() for _ in range(3))
      pair = {'own': step.call} | ({'first': first.call} if first else {})
      seconds: dict[str, list[float]] = {who: [] for who in pair}
      for _ in range(3):
        for who, call in pair.items():
          start = time.perf_counter()
          while time.perf_counter() - start < (0.1 if toy else 0.7):
            begin = time.perf_counter()
            call()
            seconds[who].append(time.perf_counter() - begin)
      ms = {who: 1e3 * statistics.median(found) for who, found in seconds.items()}
      flops = preset.flops(step.num_params, rows)
      emit(what='change', name=name, ms=round(ms['own'], 2), tflops=round(1e-9 * flops / ms['own'], 1),
           tokens_per_s=round(1e3 * rows * preset.seq_len / ms['own']), compile_s=round(step.compile_s, 1),
           gb=round(step.bytes_needed / 1e9, 2), loss=round(loss, 4),
           **({'first_ms': round(ms['first'], 2)} if first else {}))
      first = first or step
      del step
    except Exception as e:
      emit(what='change', name=name, error=f'{type(e).__name__}: {e}'[:600])


def profile(toy: bool) -> None:
  """The kernels that take the most time of a step with documents: milliseconds a step and calls."""
  import jax

  from benchmarks.step import build
  preset, batch = (PRESETS['char_tiny'], 4) if toy else (PRESETS['gpt2'], 32)
  wide = dict.fromkeys(DTYPES[1:], 'float32')
  for name, fields in (('as it is', {}), ('activations in float32', wide)):
    step = build(preset, batch, 20 if toy else MEAN_DOCUMENT, dtype='bfloat16', scan_unroll=preset.num_layers, **fields)
    for _ in range(3):
      step.call()
    with tempfile.TemporaryDirectory() as folder:
      jax.profiler.start_trace(folder)
      for _ in range(3):
        step.call()
      jax.profiler.stop_trace()
      path = next(Path(folder).glob('**/*.xplane.pb'))
      planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    spent: dict[str, list[float]] = {}
    for plane in planes:
      if plane.name.startswith('/device:') or toy:
        for line in plane.lines:
          if line.name.startswith('Stream') or toy:
            for event in line.events:
              spent.setdefault(event.name, []).append(event.duration_ns / 3e6)
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:60]
    emit(what='profile', name=name, total_ms=round(sum(map(sum, spent.values())), 2),
         kernels=[[kernel[:120], round(sum(found), 3), len(found) / 3] for kernel, found in top])


def decode(toy: bool, torch: str) -> None:
  """Tokens generated per second beside transformers."""
  for batch in (1,) if toy else (1, 8, 64):
    flags = [f'--batch={batch}', '--tokens=8' if toy else '--tokens=128', '--rounds=2',
             *([] if toy else ['--dtype=bfloat16', f'--torch={torch}', '--device=cuda'])]
    found = subprocess.run([sys.executable, '-m', 'benchmarks.generate', *flags], capture_output=True, text=True,
                           env=os.environ | ENV)
    if found.returncode:
      emit(what='decode', batch=batch, error=found.stderr[-1500:])
    else:
      emit(what='decode', **json.loads(found.stdout.splitlines()[-1]))


def run(toy: bool) -> None:
  """A real run: trained and stopped, resumed and stopped, sampled from. The data are this package's own sources."""
  sources = Path(__file__).parent.parent / 'llm_jax'
  with tempfile.TemporaryDirectory() as folder:
    config = ['--config=gpt_small', '--config.data.tokenizer=byte',
              f'--config.data.path={sources}', f'--workdir={folder}/run']
    if toy:
      config += ['--config.model.num_layers=1', '--config.num_steps=100']
    for name, command in (('train', ['train', *config, '--stop_after=60s']),
                          ('resumed', ['train', *config, '--stop_after=30s']),
                          ('generate', ['generate', f'{folder}/run', '--num_tokens=64', '--prompt=import '])):
      start = time.perf_counter()
      found = subprocess.run([sys.executable, '-m', 'llm_jax', *command], capture_output=True, text=True)
      emit(what='run', name=name, seconds=round(time.perf_counter() - start, 1), exit=found.returncode,
           output=(found.stdout + found.stderr)[-4000:])


SECTIONS: dict[str, Callable[..., None]] = {
    'peaks': peaks, 'steps': steps, 'attention': attention, 'profile': profile, 'changes': changes, 'large': large,
    'decode': decode, 'run': run}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sections', default=','.join(SECTIONS), help=f'of {", ".join(SECTIONS)} (default: all)')
  parser.add_argument('--torch', default=sys.executable, help='a Python with torch and transformers (default: this)')
  parser.add_argument('--out', type=Path, help='file of all results')
  parser.add_argument('--budget', type=float, default=1e9, help='seconds for all sections')
  parser.add_argument('--toy', action='store_true', help='tiny sizes, on any device')
  parser.add_argument('--section', choices=SECTIONS, help='internal: run one section in this process')
  args = parser.parse_args()
  if args.section:
    if args.section not in ('steps', 'decode', 'run'):
      from llm_jax.base import runtime
      runtime.prepare()
    section = SECTIONS[args.section]
    section(args.toy, args.torch) if args.section in ('steps', 'decode') else section(args.toy)
    return
  end, results = time.time() + args.budget, []
  for name in args.sections.split(','):
    limit = min(LIMITS[name], end - time.time())
    if limit < 10:
      print(f'{name}: no time left', flush=True)
      continue
    start = time.perf_counter()
    command = [sys.executable, '-m', 'benchmarks.gpu', f'--section={name}', f'--torch={args.torch}',
               *(['--toy'] if args.toy else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | ENV, start_new_session=True)
    timer = threading.Timer(limit, os.killpg, (process.pid, 9))
    timer.start()
    tail: list[str] = []
    assert process.stdout
    for line in process.stdout:
      if line.startswith('RESULT '):
        results.append({'section': name} | json.loads(line[len('RESULT '):]))
        print(f'{name} {line[len("RESULT "):]}', end='', flush=True)
        if args.out:
          args.out.write_text(json.dumps(results, indent=1) + '\n')
      else:
        tail = [*tail[-30:], line]
    timer.cancel()
    code = process.wait()
    print(f'{name}: exit {code} after {time.perf_counter() - start:.0f} s', flush=True)
    if code:
      print(''.join(tail)[-2500:], flush=True)


if __name__ == '__main__':
  main()

"""What a program sets before JAX starts: the C allocator, XLA's flags, and where compiled programs are kept.

JAX and XLA read all three once, so nothing here imports JAX. What the user has set himself stays.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import sys
from collections.abc import MutableMapping
from glob import glob
from pathlib import Path

# Flags of XLA by platform: the value, and why it is not XLA's own. An unknown flag ends the process: those of GPUs are
# known to jaxlib 0.10.2 to 0.12, those of TPUs are the ones that MaxText sets.
XLA_FLAGS: dict[str, dict[str, tuple[str, str]]] = {
    'gpu': {
        'xla_gpu_enable_latency_hiding_scheduler': ('true', 'collectives run while matmuls do'),
        'xla_gpu_enable_pipelined_all_gather': ('true', 'a layer\'s shards are gathered during the layer before it'),
        # Left alone, as XLA now has them so itself: Triton GEMMs, autotuning, command buffers, loops unrolled that hold
        # collectives, pipelined reduce-scatters, high-priority streams, and how many collectives are combined.
    },
    'tpu': {
        'xla_enable_async_all_gather': ('true', 'an all-gather need not end before the next operation begins'),
        'xla_tpu_enable_async_collective_fusion': ('true', 'collectives run inside the matmuls next to them'),
        'xla_tpu_enable_async_collective_fusion_fuse_all_gather': ('true', 'also the gathers of sharded parameters'),
        'xla_tpu_enable_async_collective_fusion_multiple_steps': ('true', 'and over several matmuls'),
        'xla_tpu_overlap_compute_collective_tc': ('true', 'the core computes while its links are busy'),
    },
    'cpu': {},  # wider vectors, fast math, other dot emitters: slower, or no different, side by side
}
VARIABLE = {'gpu': 'XLA_FLAGS', 'tpu': 'LIBTPU_INIT_ARGS', 'cpu': 'XLA_FLAGS'}

CACHE_BYTES = 2 << 30  # what compiled programs may take on disk; the least recently used go first
MIN_COMPILE_SECONDS = 0.05  # what compiles faster than this is not worth a file


def add_flag(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--tuning', choices=('on', 'off'), default='on', help='off: leave the C allocator and the flags '
                      'of XLA as they are (llm_jax/runtime.py says what is set, and why)')


def prepare(tuning: bool = True) -> str:
  """Sets allocator and flags (if `tuning`) and the cache of compiled programs; says in one line what it did."""
  if 'jax' in sys.modules:
    return 'nothing is set, as jax was there before'
  platform = find_platform()
  kept = tuning and platform == 'cpu' and keep_freed_memory()
  flags = add_xla_flags(platform, os.environ) if tuning else []
  return '; '.join(['malloc keeps freed memory' if kept else 'malloc as it was', keep_compiled(os.environ),
                    f'XLA flags: {" ".join(flags) or "none"}'])


def find_platform() -> str:
  """'tpu', 'gpu' or 'cpu': what JAX will take, told without it by its plugins and by what lies in /dev."""
  asked = os.environ.get('JAX_PLATFORMS', '').split(',')[0].strip().lower()
  if asked:
    return {'cuda': 'gpu', 'rocm': 'gpu'}.get(asked, asked)
  tpu = glob('/dev/accel*') or glob('/dev/vfio/[0-9]*') or any(name.startswith('TPU_') for name in os.environ)
  if tpu and importlib.util.find_spec('libtpu'):
    return 'tpu'
  gpu = glob('/dev/nvidia*') or glob('/proc/driver/nvidia') or glob('/dev/dxg')  # the last: Windows' Linux
  if gpu and any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13)):
    return 'gpu'
  return 'cpu'


def keep_freed_memory() -> bool:
  """Has glibc's malloc keep what is freed; False where it is another malloc, or where the user has set it.

  XLA:CPU allocates the temporary arrays of a program at every execution. glibc takes blocks over 128 KiB from the
  kernel one by one and gives them back when freed, so every step would fault in all its pages again, zeroed.
  """
  if any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get('GLIBC_TUNABLES', ''):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
    return False
  options = {  # the numbers are those of malloc.h
      -4: 0,  # M_MMAP_MAX: no block has a mapping of its own, which free() would undo
      -1: -1,  # M_TRIM_THRESHOLD: the end of the heap is never given back
      -2: 64 << 20,  # M_TOP_PAD: the heap grows by 64 MiB at a time
      -8: 1,  # M_ARENA_MAX: one heap, as what one thread freed would be no use to another one's heap
  }
  return all([mallopt(option, value) for option, value in options.items()])


def add_xla_flags(platform: str, environ: MutableMapping[str, str]) -> list[str]:
  """Appends the platform's flags to its variable, but those that are set there; returns what was appended."""
  variable = VARIABLE.get(platform, 'XLA_FLAGS')
  present = environ.get(variable, '').split()
  if present and not present[0].startswith('-'):
    return []  # the name of a file that holds the flags
  names = {flag.lstrip('-').partition('=')[0] for flag in present}
  added = [f'--{name}={value}' for name, (value, _) in XLA_FLAGS.get(platform, {}).items() if name not in names]
  if added:
    environ[variable] = ' '.join(present + added)
  return added


def user_cache() -> Path:
  """$LLM_JAX_CACHE, else llm_jax in the user's cache folder."""
  default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'llm_jax'
  return Path(os.environ.get('LLM_JAX_CACHE') or default).expanduser()


def keep_compiled(environ: MutableMapping[str, str]) -> str:
  """Has JAX keep compiled programs on disk, up to CACHE_BYTES; says where. A folder that cannot be used is left.

  JAX's key of a program covers the versions, the flags and the CPU's instructions, so hosts may share the folder.
  """
  theirs = environ.get('JAX_COMPILATION_CACHE_DIR')
  if theirs == '' or environ.get('JAX_ENABLE_COMPILATION_CACHE', '1').lower() in ('0', 'false', 'no', 'off', 'n', 'f'):
    return 'compiled programs not kept'
  if theirs:
    return f'compiled programs kept in {theirs}'
  folder = user_cache() / 'compiled'
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # whoever writes here has this process run his code
      raise PermissionError('the folder is another user\'s')
    if not os.access(folder, os.W_OK):
      raise PermissionError('the folder is read-only')
    if environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(CACHE_BYTES)) != '-1':  # unbounded: no times of use
      mend(folder)
  except (ImportError, OSError) as e:
    return f'compiled programs not kept in {folder} ({e.strerror or e if isinstance(e, OSError) else e})'
  environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', str(MIN_COMPILE_SECONDS))
  return f'compiled programs kept in {folder}'


def mend(folder: Path) -> None:
  """Removes what a process that was killed, or a full disk, left half written: an entry without its time of use.

  JAX writes the time last; without it 0.10.2 can neither bound the cache nor write to it again.
  """
  import filelock  # JAX needs it too, to bound the cache
  with filelock.FileLock(folder / '.lockfile', timeout=10):
    for entry in folder.glob('*-cache'):
      if not entry.with_name(entry.name.removesuffix('cache') + 'atime').exists():
        entry.unlink()

"""Process settings from before JAX starts: the C allocator, XLA's flags, and the cache of compiled programs.

They are read once, when JAX starts, so this module does not import JAX. Values that the user has set are kept.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Mapping, MutableMapping
from glob import glob
from pathlib import Path

from llm_jax.base.errors import ConfigError

# XLA flags by platform: the value, and why it differs from XLA's default. An unknown flag ends the process: jaxlib
# 0.10.2 to 0.12 know the GPU flags; the TPU flags are those that MaxText sets.
XLA_FLAGS: dict[str, dict[str, tuple[str, str]]] = {
    'gpu': {
        'xla_gpu_enable_latency_hiding_scheduler': ('true', 'collectives run while matmuls do'),
        'xla_gpu_enable_pipelined_all_gather': ('true', 'a layer\'s shards are gathered during the layer before it'),
        # Not set, as XLA's defaults are good now: Triton GEMMs, autotuning, command buffers, unrolling of loops with
        # collectives, pipelined reduce-scatters, high-priority streams, and combining of collectives.
    },
    'tpu': {
        'xla_enable_async_all_gather': ('true', 'an all-gather need not end before the next operation begins'),
        'xla_tpu_enable_async_collective_fusion': ('true', 'collectives run inside the matmuls next to them'),
        'xla_tpu_enable_async_collective_fusion_multiple_steps': ('true', 'and over several matmuls'),
        'xla_tpu_overlap_compute_collective_tc': ('true', 'the core computes while its links are busy'),
    },
    # By chip: the compiler refuses it for v5p and v6e.
    'v5e': {
        'xla_tpu_enable_async_collective_fusion_fuse_all_gather': ('true', 'also the gathers of sharded parameters'),
    },
    'cpu': {},  # wider vectors, fast math and other dot emitters were measured to be no faster
}
VARIABLE = {'gpu': 'XLA_FLAGS', 'tpu': 'LIBTPU_INIT_ARGS', 'cpu': 'XLA_FLAGS'}

BUCKETS = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs'}  # packages by which JAX reads and writes URLs
CACHE_BYTES = 2 << 30  # limit of compiled programs on disk; the least recently used are removed first
NEW_OBJECTS = 50_000  # between two collections of garbage; importing and tracing create many objects that stay
MIN_COMPILE_SECONDS = 0.05  # programs that compile faster are not cached


def prepare(tuning: bool = True) -> str:
  """Sets allocator and flags (if `tuning`), the cache of compiled programs and the garbage collector.

  Returns one line on what was set.
  """
  if 'jax' in sys.modules:
    return 'nothing set, as jax was already imported'
  gc.set_threshold(NEW_OBJECTS)
  platform = find_platform()
  kept = tuning and platform == 'cpu' and keep_freed_memory()
  flags = add_xla_flags(platform, os.environ, find_chip() if platform == 'tpu' else '') if tuning else []
  return '; '.join(['malloc keeps freed memory' if kept else 'malloc unchanged', keep_compiled(os.environ),
                    f'XLA flags: {" ".join(flags) or "none"}'])


def find_platform() -> str:
  """The platform that JAX will choose: 'tpu', 'gpu' or 'cpu', from its installed plugins and the files in /dev."""
  asked = os.environ.get('JAX_PLATFORMS', '').split(',')[0].strip().lower()
  if asked:
    return {'cuda': 'gpu', 'rocm': 'gpu'}.get(asked, asked)
  tpu = glob('/dev/accel*') or glob('/dev/vfio/[0-9]*') or any(name.startswith('TPU_') for name in os.environ)
  if tpu and importlib.util.find_spec('libtpu'):
    return 'tpu'
  gpu = glob('/dev/nvidia*') or glob('/proc/driver/nvidia') or glob('/dev/dxg')  # the last one: WSL
  if gpu and any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13)):
    return 'gpu'
  return 'cpu'


def keep_freed_memory() -> bool:
  """Makes glibc's malloc keep freed memory; returns False for another malloc, or where the user has configured it.

  XLA:CPU allocates the temporary arrays of a program at every execution. By default glibc maps each block over 128 KiB
  and unmaps it when freed, so every step would page-fault and zero all of its memory again.
  """
  if any(name.startswith('MALLOC_') for name in os.environ) or 'malloc' in os.environ.get('GLIBC_TUNABLES', ''):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
    return False
  options = {  # numbers from malloc.h
      -4: 0,  # M_MMAP_MAX: no block gets its own mapping, which free() would unmap
      -1: -1,  # M_TRIM_THRESHOLD: the end of the heap is never returned to the kernel
      -2: 64 << 20,  # M_TOP_PAD: the heap grows by 64 MiB at a time
      -8: 1,  # M_ARENA_MAX: one heap for all threads, so that any thread can reuse freed memory
  }
  return all([mallopt(option, value) for option, value in options.items()])


def find_chip(environ: Mapping[str, str] = os.environ, pci: str = '/sys/bus/pci/devices') -> str:
  """'v5e' if this host's TPUs are TPU v5e, else ''; from what Cloud TPU sets or the PCI bus, before JAX starts."""
  if environ.get('TPU_ACCELERATOR_TYPE', '').startswith('v5litepod'):
    return 'v5e'
  ids = ('0x1ae0', '0x0063')  # of Google, and of the chip
  found = (tuple(Path(folder, name).read_text().strip() for name in ('vendor', 'device')) for folder in glob(f'{pci}/*')
           if Path(folder, 'vendor').exists() and Path(folder, 'device').exists())
  return 'v5e' if ids in found else ''


def add_xla_flags(platform: str, environ: MutableMapping[str, str], chip: str = '') -> list[str]:
  """Appends the flags of platform and chip to their environment variable, unless set there; returns those."""
  variable = VARIABLE.get(platform, 'XLA_FLAGS')
  present = environ.get(variable, '').split()
  if present and not present[0].startswith('-'):
    return []  # the variable names a file of flags
  names = {flag.lstrip('-').partition('=')[0] for flag in present}
  flags = XLA_FLAGS.get(platform, {}) | XLA_FLAGS.get(chip, {})
  added = [f'--{name}={value}' for name, (value, _) in flags.items() if name not in names]
  if added:
    environ[variable] = ' '.join(present + added)
  return added


def user_cache() -> Path:
  """$LLM_JAX_CACHE, else llm_jax in the user's cache folder. Raises ConfigError for a URL."""
  folder = os.environ.get('LLM_JAX_CACHE') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'llm_jax'
  if '://' in str(folder):
    raise ConfigError(f'LLM_JAX_CACHE={folder}: must be a folder; '
                      'compiled programs alone can be in a bucket: JAX_COMPILATION_CACHE_DIR')
  return Path(folder).expanduser()


def keep_compiled(environ: MutableMapping[str, str]) -> str:
  """Makes JAX cache compiled programs on disk, up to CACHE_BYTES; returns a line on where. Skips an unusable folder.

  JAX's cache key covers versions, flags and the CPU's instructions, so hosts may share the folder.
  """
  theirs = environ.get('JAX_COMPILATION_CACHE_DIR')
  if theirs == '' or environ.get('JAX_ENABLE_COMPILATION_CACHE', '1').lower() in ('0', 'false', 'no', 'off', 'n', 'f'):
    return 'compiled programs not kept'
  package = BUCKETS.get(theirs.partition('://')[0]) if theirs and '://' in theirs else None
  if package and not importlib.util.find_spec(package):
    del environ['JAX_COMPILATION_CACHE_DIR']  # JAX would warn of each program
    return f"compiled programs not kept in {theirs}, which needs {package}: pip install 'llm_jax[cloud]'"
  if theirs:
    return f'compiled programs kept in {theirs}'
  folder = user_cache() / 'compiled'
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # programs in the cache are executed, so its owner must be this user
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
  """Removes incomplete cache entries, which a killed process or a full disk leaves: those without an access time.

  JAX writes the access time last; with an entry that lacks it, JAX 0.10.2 can neither bound the cache nor write to it.
  """
  import filelock  # JAX needs it too, to bound the cache
  with filelock.FileLock(folder / '.lockfile', timeout=10):
    for entry in folder.glob('*-cache'):
      if not entry.with_name(entry.name.removesuffix('cache') + 'atime').exists():
        entry.unlink()

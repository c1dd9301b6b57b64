"""Settings from before JAX starts; tested in separate processes, as they cannot be undone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from s3 import s3_server

from llm_jax.base import runtime
from llm_jax.base.errors import ConfigError

FAULTS = '''
import ctypes, resource, sys
from llm_jax.base import runtime
print(runtime.keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
  begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(8 << 20)
  ctypes.memset(block, 1, 8 << 20)
  libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin
touch()
print(sum(touch() for _ in range(10)))
'''

COMPILE = '''
import os
from llm_jax.base import runtime
print(runtime.prepare())
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith('/cache_hits') else None)
print(jax.jit(lambda x: x * 2 + 1)(20.5), len(hits))
print(jax.jit(lambda x: eval(os.environ.get('SECOND', 'x')))(3.0))
'''


def python(code, *, size_limit=None, **variables):
  """The output of a new Python process with these variables, and without those of JAX and malloc."""
  kept = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_', 'XLA_', 'MALLOC_'))}
  limit = f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size_limit}, {size_limit}))\n'
  done = subprocess.run([sys.executable, '-c', (limit if size_limit else '') + code], capture_output=True, text=True,
                        timeout=120, env=kept | {'JAX_PLATFORMS': 'cpu'} | variables)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines(), done.stderr


def compiled(cache, **variables):
  """(line returned by prepare, number of programs loaded from the cache)."""
  (said, first, _), _ = python(COMPILE, LLM_JAX_CACHE=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
                               **variables)
  value, hits = first.split()
  assert float(value) == 42.0
  return said, int(hits)


@pytest.mark.skipif(not sys.platform.startswith('linux') or 'glibc' not in os.confstr('CS_GNU_LIBC_VERSION'),
                    reason='glibc alone')
def test_freed_memory_is_reused_without_page_faults():
  (tuned, faults), _ = python(FAULTS)
  assert tuned == 'True' and int(faults) < 100
  (tuned, faults), _ = python(FAULTS, MALLOC_ARENA_MAX='4')  # the user's own settings stay
  assert tuned == 'False' and int(faults) > 100


def test_the_users_xla_flags_are_kept():
  name, (value, _) = next(iter(runtime.XLA_FLAGS['gpu'].items()))
  for mine in ('--xla_dump_to=/tmp/x', f'--{name}=false', f'--xla_dump_to=/tmp/x --{name}'):
    environ = {'XLA_FLAGS': mine}
    added = runtime.add_xla_flags('gpu', environ)
    assert environ['XLA_FLAGS'].split() == mine.split() + added
    assert (f'--{name}={value}' in added) == (name not in mine)
    assert runtime.add_xla_flags('gpu', environ) == []  # a child process finds them there
  environ = {}
  assert runtime.add_xla_flags('tpu', environ) == environ['LIBTPU_INIT_ARGS'].split()
  of_v5e = {}
  assert len(runtime.add_xla_flags('tpu', of_v5e, 'v5e')) == len(runtime.add_xla_flags('tpu', {})) + 1
  for environ, platform in (({}, 'cpu'), ({}, 'metal'), ({'XLA_FLAGS': 'flags.txt'}, 'gpu')):
    before = dict(environ)
    assert runtime.add_xla_flags(platform, environ) == [] and environ == before


def test_the_chip_is_known_from_cloud_tpu_or_the_bus(tmp_path):
  assert runtime.find_chip({'TPU_ACCELERATOR_TYPE': 'v5litepod-16'}) == 'v5e'
  for name, (vendor, device) in {'a': ('0x8086', '0x0063'), 'b': ('0x1ae0', '0x0062')}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / 'vendor').write_text(vendor + '\n')
    (tmp_path / name / 'device').write_text(device + '\n')
  assert runtime.find_chip({'TPU_ACCELERATOR_TYPE': 'v5p-8'}, str(tmp_path)) == ''
  (tmp_path / 'b' / 'device').write_text('0x0063\n')
  assert runtime.find_chip({}, str(tmp_path)) == 'v5e'


def test_this_xla_knows_all_gpu_flags():
  code = ('import os; from llm_jax.base import runtime; runtime.add_xla_flags("gpu", os.environ); '
          'import jaxlib.xla_client as xla; xla.CompileOptions(); print(os.environ["XLA_FLAGS"])')
  (flags,), _ = python(code)
  assert flags.count('--xla_gpu') == len(runtime.XLA_FLAGS['gpu'])


def test_platform_follows_jax_platforms(monkeypatch):
  for asked, platform in (('cpu', 'cpu'), ('cuda,cpu', 'gpu'), ('tpu', 'tpu'), ('ROCM', 'gpu')):
    monkeypatch.setenv('JAX_PLATFORMS', asked)
    assert runtime.find_platform() == platform


def test_the_cache_is_reused_bounded_and_repaired(tmp_path):
  folder = tmp_path / 'compiled'
  folder.mkdir()
  # As a kill or a full disk leaves it: jax 0.10.2 would stumble over it whenever it looks for room.
  broken = folder / 'jit_broken-cache'
  broken.write_bytes(b'half')
  said, hits = compiled(tmp_path)
  assert said == f'malloc keeps freed memory; compiled programs kept in {folder}; XLA flags: none' and hits == 0
  before = set(folder.glob('*-cache'))
  assert before and broken not in before
  # Full now: the next program takes the place of one, the first is still found.
  bound = sum(entry.stat().st_size for entry in before) + 10
  assert compiled(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE=str(bound), SECOND='x * x - 1')[1] > 0
  after = set(folder.glob('*-cache'))
  assert after - before and before - after
  assert sum(entry.stat().st_size for entry in after) <= bound


def test_the_users_cache_settings_are_kept(tmp_path):
  environ = {'JAX_COMPILATION_CACHE_DIR': '/mine'}
  assert runtime.keep_compiled(environ) == 'compiled programs kept in /mine'
  off = {'JAX_ENABLE_COMPILATION_CACHE': '0'}
  assert runtime.keep_compiled(off) == 'compiled programs not kept'
  assert (len(environ), len(off)) == (1, 1)


def test_an_unwritable_cache_is_not_used(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('in the way')
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'file'))
  environ = {}
  assert re.fullmatch(r'compiled programs not kept in .*file/compiled \(Not a directory\)',
                      runtime.keep_compiled(environ))
  assert not environ
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(os, 'getuid', lambda: -1)  # what another user may write, he could have this one run
  assert 'another user' in runtime.keep_compiled(environ)
  assert not environ


@pytest.mark.slow
def test_a_full_disk_only_disables_the_cache(tmp_path):
  full = 'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n' + COMPILE
  (_, first, _), errors = python(full, size_limit=100, LLM_JAX_CACHE=str(tmp_path),
                                 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  assert first == '42.0 0' and 'Traceback' not in errors


def test_nothing_is_set_after_jax_is_imported():
  before = dict(os.environ)
  assert 'jax was already imported' in runtime.prepare()  # conftest.py imported it
  assert dict(os.environ) == before


def test_commands_prepare_before_importing_jax():
  code = 'import sys, llm_jax.main, llm_jax.commands.evaluate, llm_jax.commands.generate; print("jax" in sys.modules)'
  assert python(code)[0] == ['False']
  assert 'import jax' not in Path(runtime.__file__).read_text()


def test_compiled_programs_in_a_bucket_are_found_again(tmp_path, monkeypatch):
  with s3_server(monkeypatch):
    bucket = {'JAX_COMPILATION_CACHE_DIR': 's3://bucket/compiled'}
    said, hits = compiled(tmp_path, **bucket)
    assert 'compiled programs kept in s3://bucket/compiled' in said and hits == 0
    assert compiled(tmp_path, **bucket)[1] > 0 and not list(tmp_path.iterdir())


def test_a_bucket_without_its_package_and_a_cache_in_a_bucket_are_named(monkeypatch):
  monkeypatch.setattr(runtime, 'BUCKETS', {'gs': 'no_such_package'})
  environ = {'JAX_COMPILATION_CACHE_DIR': 'gs://bucket/compiled'}
  said = runtime.keep_compiled(environ)
  assert said == "compiled programs not kept in gs://bucket/compiled, which needs no_such_package: pip install " \
                 "'llm_jax[cloud]'" and not environ
  monkeypatch.setenv('LLM_JAX_CACHE', 'gs://bucket/cache')
  with pytest.raises(ConfigError, match='LLM_JAX_CACHE=gs://bucket/cache: must be a folder'):
    runtime.user_cache()

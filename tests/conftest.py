"""Default signals, eight virtual CPU devices, separate caches, and errors on implicit broadcasting between ranks."""

import gc
import os
import shutil
import signal
import tempfile

os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # each process would compile all modules of the package again
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
if 'PYTEST_XDIST_WORKER' not in os.environ:  # all workers share one
  os.environ['LLM_JAX_CACHE'] = tempfile.mkdtemp(prefix='llm_jax_tests_')

import jax
import pytest

for number in (signal.SIGHUP, signal.SIGINT):  # which nohup and a shell's & ignore, in the processes of tests too
  if signal.getsignal(number) is signal.SIG_IGN:
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
if jax.__version_info__ < (0, 11):  # compiles in 35% of the time; later versions abort on an unknown flag
  os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
gc.set_threshold(50_000)  # as llm_jax.base.runtime does
jax.config.update('jax_numpy_rank_promotion', 'raise')
# With tiny models, compiling takes more time than running.
jax.config.update('jax_disable_most_optimizations', True)
# All tests share compiled programs, as the same small programs occur in many of them.
jax.config.update('jax_compilation_cache_dir', os.path.join(os.environ['LLM_JAX_CACHE'], 'compiled'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
  """Each test begins without the plug-ins that another one loaded, which would be noted in its runs."""
  from llm_jax.base import plugins
  monkeypatch.setattr(plugins, '_loaded', {})


def pytest_unconfigure(config):
  """Removes the cache of the session, which all workers shared."""
  del config
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    shutil.rmtree(os.environ['LLM_JAX_CACHE'], ignore_errors=True)

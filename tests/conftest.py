"""Eight virtual CPU devices, caches of their own, and no silent broadcasting between ranks."""

import os
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
if 'PYTEST_XDIST_WORKER' not in os.environ:  # one for all workers
  os.environ['LLM_JAX_CACHE'] = tempfile.mkdtemp(prefix='llm_jax_tests_')

import jax

if jax.__version_info__ < (0, 11):  # compiles in 60% of the time; later ones have no such choice, and end at the word
  os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false'
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tiny models: compiling is what takes time here, not running.
jax.config.update('jax_disable_most_optimizations', True)
# The same small programs are compiled again and again: once is enough.
jax.config.update('jax_compilation_cache_dir', os.path.join(os.environ['LLM_JAX_CACHE'], 'compiled'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

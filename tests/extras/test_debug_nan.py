"""llm-jax debug-nan: faults planted in a layer of a plug-in are found by module and pass."""

import pytest
from program import write_config

import llm_jax
from llm_jax.base import plugins
from llm_jax.base.errors import ConfigError
from llm_jax.extras.commands import debug_nan

# Step 5 has a NaN in the forward pass of the hidden layer; step 3 one in the backward pass alone: sqrt at 0.
PLUGIN = '''
import jax.numpy as jnp
from functools import partial
from llm_jax.base.registry import NoSettings, register
from llm_jax.layers.clock import progress
from llm_jax.layers.mlp import MLP, MLPS

def sick(h):
  time = jnp.asarray(progress(5), jnp.float32)
  return jnp.sqrt(jnp.where(time == 0.4, 0.0, 1.0) * jnp.square(h)) + jnp.where(time == 0.8, jnp.nan, 0.0)

if 'sick' not in MLPS:
  register(MLPS, 'sick', lambda settings: partial(MLP, activation=sick), NoSettings)
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('nan')
  (folder / 'sick.py').write_text(PLUGIN)
  loaded = plugins._loaded.copy()
  plugins.load_all([str(folder / 'sick.py')])
  config = llm_jax.load_config(write_config(folder), **{
      'model.mlp': 'sick', 'num_steps': 6, 'checkpoint.every': 2, 'eval.every': 0, 'model.remat': 'full'})
  logged = list(llm_jax.train(config, folder / 'run'))
  assert [step['train/skipped'] for step in logged] == [0, 0, 1, 0, 1, 0]
  plugins._loaded = loaded  # else later tests' runs would note it
  return folder / 'run', logged


def printed(run, step, capsys):
  capsys.readouterr()
  debug_nan.main([str(run), f'--plugin={run.parent}/sick.py', f'--step={step}'])
  return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_first_module_of_the_forward_pass_is_named(run, capsys):
  first, *rest = printed(run[0], 5, capsys)
  assert first.startswith('first in the forward pass: output of Block[0]/mlp/down (Einsum) [8, 32, 32]: 8192 of 8192')
  assert 'finite before: Block[0]/mlp/up (Einsum)' in first
  assert rest[-1].startswith('loss nan') and any(line.startswith('gradient of parameter blocks/') for line in rest)


@pytest.mark.slow
def test_a_fault_of_the_backward_pass_alone_is_named(run, capsys):
  first, *rest = printed(run[0], 3, capsys)
  assert first.startswith('first in the backward pass: gradient of the output of Block[1]/mlp/up (Einsum)')
  assert 'finite before: Block[1]/mlp/down (Einsum)' in first and 'gradient norm nan' in rest[-1]


@pytest.mark.slow
def test_a_good_step_is_replayed_to_the_same_loss(run, capsys):
  *_, numbers, verdict = printed(run[0], 6, capsys)
  assert verdict == 'all outputs and gradients of this step are finite'
  assert float(numbers.split()[1].rstrip(',')) == pytest.approx(run[1][-1]['train/loss'], rel=1e-3)


@pytest.mark.slow
def test_a_step_that_the_run_does_not_have(run):
  with pytest.raises(ConfigError, match='--step: must be from 1 to num_steps, 6; got 7'):
    debug_nan.main([str(run[0]), f'--plugin={run[0].parent}/sick.py', '--step=7'])

"""Small steps compiled by the compilers of TPUs and GPUs, where they are installed; nothing runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ['--config=configs/gpt_small.py', '--config.model.num_layers=2', '--config.model.scan_unroll=1',
         '--config.model.embed_dim=256', '--config.model.num_heads=4', '--config.model.vocab_size=1024',
         '--config.data.seq_len=256', '--config.batch_tokens=8192', '--config.tokens_per_device=1024',
         '--config.mesh.data=1', '--config.mesh.fsdp=-1']
pytestmark = pytest.mark.slow


def plan_of(folder, place, *flags):
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'plan', f'--on={place}', f'--json={folder}/plan.json', *FLAGS,
                         *flags], cwd=ROOT, capture_output=True, text=True, timeout=170,
                        env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'plan.json').read_text())


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra plan-tpu')
def test_a_step_with_splash_attention_is_compiled_for_a_tpu(tmp_path):
  plan = plan_of(tmp_path, 'v5e:2x2')
  assert plan['kind'] == 'TPU v5 lite' and plan['mesh']['fsdp'] == 4 and plan['dtypes']['stream_dtype'] == 'bfloat16'
  assert sum(count for name, count in plan['kernels'].items() if 'splash' in name) > 0
  assert 0 < plan['memory']['compiled']['peak'] < 15 * 2**30 and plan['memory']['fits']
  assert plan['collectives'] and plan['seconds']['compile'] > 0


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra plan-tpu')
def test_a_shape_that_no_slice_has_is_refused(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'plan', '--on=v5e:3x5', *FLAGS], cwd=ROOT,
                        capture_output=True, text=True, timeout=100, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 78 and 'legal are 2x2, 2x4' in done.stderr


@pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None, reason='needs the extra plan-gpu')
def test_a_step_with_fused_attention_is_compiled_for_gpus(tmp_path):
  plan = plan_of(tmp_path, 'h100:8', '--config.mesh.data=2')
  shared = {axis: size for axis, size in plan['mesh'].items() if size > 1}
  assert plan['kind'].startswith('NVIDIA H100') and shared == {'data': 2, 'fsdp': 4}
  assert sum(count for name, count in plan['kernels'].items() if 'fmha' in name) > 0
  assert {row['kind'] for row in plan['collectives']} >= {'all-gather', 'reduce-scatter'}
  summed = [row for row in plan['collectives'] if row['axes'] == ['data'] and row['wire_bytes'] > 1e5]
  assert all(row['kind'] == 'all-reduce' and row['dtype'] == 'bf16' for row in summed) and len(summed) > 0
  assert 0 < plan['memory']['compiled']['peak'] < 59 * 2**30


@pytest.mark.skipif(importlib.util.find_spec('jax_cuda13_plugin') is None, reason='needs the extra plan-gpu')
def test_hosts_of_gpus_send_sums_of_shards_to_each_other_and_state_is_in_their_memory(tmp_path):
  plan = plan_of(tmp_path, 'h100:2x4', '--config.mesh.data=2', '--config.mesh.fsdp=4', '--config.mesh.dcn_data=2',
                 '--config.mesh.offload=all')
  for row in plan['collectives']:
    assert (row['network_bytes'] > 0) == ('data' in row['axes']), row
  between = sum(row['network_bytes'] for row in plan['collectives'])
  assert 0.9 < between / (2 * plan['num_parameters'] / 4) < 1.3, 'a quarter of the gradients, in bfloat16'
  assert plan['memory']['compiled']['arguments'] < 100_000, 'the batch alone'

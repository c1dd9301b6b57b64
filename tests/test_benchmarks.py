"""Benchmarks still run on what they measure. Nothing here asserts a time."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').glob('*.py')), ids=lambda path: path.stem)
def test_benchmark_imports_exist(path):
  """Inside functions too: most import only after the allocator's settings."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and re.match(r'llm_jax|benchmarks(?!\.torch)', node.module or ''):
      module = importlib.import_module(node.module)
      for name in node.names:
        if not hasattr(module, name.name):
          importlib.import_module(f'{node.module}.{name.name}')


@pytest.mark.slow
def test_step_prints_its_timing_as_json():
  command = [sys.executable, '-m', 'benchmarks.step', '--preset=char_tiny', '--steps=1', '--warmup=1', '--batch=8']
  env = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
  assert result.returncode == 0, result.stderr
  row = json.loads(result.stdout.splitlines()[-1])
  assert row['preset'] == 'char_tiny' and 3 < row['loss'] < 5
  assert {'tokens_per_second', 'best_tokens_per_second', 'step_ms', 'model_flops_per_second', 'dtype'} <= row.keys()


@pytest.mark.slow
def test_the_models_of_the_byte_study_have_equally_many_parameters():
  from benchmarks.byte_patch import TEXTS, equal_mlp_dims, num_params, resolved, study_config
  sizes = [num_params(resolved(study_config(model, next(iter(TEXTS)), dim))) for model, dim in equal_mlp_dims().items()]
  assert len(sizes) == 3 and max(sizes) < 1.001 * min(sizes)


@pytest.mark.slow
def test_planned_memory_is_that_of_the_process():
  result = subprocess.run([sys.executable, '-m', 'benchmarks.plan_memory', '--only=base'], cwd=ROOT,
                          capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  [row] = json.loads(result.stdout.splitlines()[-1])
  assert 0.97 < row['predicted'] / row['measured'] < 1.1

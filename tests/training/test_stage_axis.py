"""A run on a mesh with the axis stage goes on with another number of stages."""

import jax
import pytest
from program import write_config

import llm_jax

SETTINGS = {
    'num_steps': 6, 'eval.every': 3, 'eval.sample_tokens': 8, 'log.every': 1, 'checkpoint.every': 2,
    'batch_tokens': 512, 'tokens_per_device': 32,
    'model.dropout': 0.0, 'model.dtype': 'float32', 'model.num_layers': 4, 'model.remat': 'full'}


def train(folder, name, stop=None, **mesh):
  """{step: its metrics}; the run ends after the step `stop`."""
  config, lines = llm_jax.load_config(folder / 'tiny.py', **SETTINGS, **mesh), {}
  for line in llm_jax.train(config, folder / name):
    lines[line['step']] = line
    if line['step'] == stop:
      break
  return lines


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_stages(tmp_path, capsys):
  """Losses, evaluations and checkpoints do not depend on the stages."""
  write_config(tmp_path)
  whole = train(tmp_path, 'whole')
  found = train(tmp_path, 'parts', 4, **{'mesh.stage': 2, 'mesh.repeats': 2, 'mesh.data': 2, 'mesh.tensor': 2})
  assert 'pipeline: 8 microbatches through 2 stages, 2 times, which are idle for 5.9% of their time' in (
      capsys.readouterr().out)
  found |= train(tmp_path, 'parts', 5, **{'mesh.stage': 4, 'mesh.data': 1, 'mesh.fsdp': 2})
  found |= train(tmp_path, 'parts')
  assert sorted(found) == sorted(whole) and len(jax.devices()) == 8
  for step, line in whole.items():
    for name in ('train/loss', 'val/loss'):
      assert found[step].get(name) == pytest.approx(line.get(name), abs=1e-5), (step, name)

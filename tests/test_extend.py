"""The plug-ins of docs/extend.md, as a user runs them: files in a folder of their own, real processes."""

import json
import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from program import ROOT, finish, signal_at, start_in_turn

from llm_jax.base import plugins
from llm_jax.base.errors import ConfigError
from llm_jax.base.trees import by_name
from llm_jax.commands import generate
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.training.log import read_metrics

PAGE = (ROOT / 'docs' / 'extend.md').read_text()
FILES = {name: f'# {name}\n{body}' for name, body in re.findall(r'```python\n# (\w+\.py)\n(.*?)```', PAGE, re.S)}

CONFIG = '''
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 12
  config.batch_tokens = 256
  config.tokens_per_device = 128
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 2
  config.data.path = 'text.txt'
  config.data.tokenizer = 'byte'
  config.data.seq_len = 32
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 2
  config.eval.every = 50
  config.eval.sample_tokens = 0
  config.checkpoint.every = 10
  config.log.every = 1
  return config
'''

PARTS = ('moe', 'fortune', 'frequent_words', 'noisy_inputs', 'focal', 'optimizers', 'stairs', 'target')
# Flags of each run. A model, an optimizer and a metric share one, all other parts another: compiling takes the time.
RUNS = {
    'model': ('--plugin=causal_conv.py', '--plugin=optimizers.py', '--plugin=top_k_accuracy.py',
              '--config.model.name=causal_conv', '--config.model.width=3', '--config.optim.lamb.b1=0.8',
              '--config.optim.chain=clip_by_global_norm,lamb', '--config.eval.metrics=top_k_accuracy',
              '--config.num_steps=30', '--config.optim.learning_rate=6e-3'),
    'parts': (*(f'--plugin={name}.py' for name in PARTS), '--config.model.mlp=moe', '--config.model.moe.num_experts=4',
              '--config.data.path=fortunes', '--config.data.format=fortune', '--config.data.tokenizer=frequent_words',
              '--config.data.frequent_words.num_words=20', '--config.data.task=noisy_inputs',
              '--config.data.packing=pad', '--config.data.noisy_inputs.rate=0.3', '--config.loss.terms=focal',
              '--config.loss.focal.gamma=1', '--config.optim.chain=signum', '--config.optim.schedule=stairs',
              '--config.optim.stairs.factor=0.1', '--config.log.callbacks=target'),
}
LORA = (*(flag for flag in RUNS['parts'] if 'callbacks' not in flag), '--plugin=lora.py', '--config.num_steps=6',
        '--config.model.einsum=lora', '--config.model.lora.rank=2', '--config.start.run=parts',
        '--config.optim.groups.base.frozen=true', '--config.optim.groups.base.pattern=^(?!.*lora_[ab]$)')


NAMED = tuple(flag for flag in RUNS['parts'] if flag.startswith('--plugin'))


def train(run, flags):
  return 'train', '--config=tiny.py', f'--workdir={run}', *flags


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('extend')
  for name, content in FILES.items():
    (folder / name).write_text(content)
  (folder / 'tiny.py').write_text(CONFIG)
  (folder / 'text.txt').write_bytes((ROOT / 'llm_jax' / 'config.py').read_bytes())
  (folder / 'fortunes').write_text('\n%\n'.join(f'cat {i} sat on the mat of sir {i * i}' for i in range(500)))
  return folder


@pytest.fixture(scope='module')
def outputs(folder):
  """What three processes printed. A run in the middle of which the first one is killed is resumed by the third.

  The second process evaluates the first one's run from the copies of its plug-ins, of which it was given others. The
  third resumes with a plug-in whose comments were edited, and generates with the second one's run.
  """
  process = start_in_turn(folder, train('model', RUNS['model']), train('killed', RUNS['model']))
  signal_at(process, folder / 'killed', 13, signal.SIGKILL, saved=10)
  finish(process, code=-9)
  (folder / 'edited').mkdir()
  (folder / 'edited' / 'causal_conv.py').write_text(FILES['causal_conv.py'] + '# edited\n')
  parts = finish(start_in_turn(folder, train('parts', RUNS['parts']), train('lora', LORA),
                               ('evaluate', '--workdir=model', '--trust')))
  killed = finish(start_in_turn(
      folder, train('killed', ('--plugin=edited/causal_conv.py', *RUNS['model'][1:])),
      ('generate', '--workdir=parts', '--prompt=the mat', '--num_tokens=4', *NAMED)))
  return {'parts': parts, 'killed': killed}


def arrays(workdir):
  """The parameters of the last checkpoint by path."""
  step = max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
  restored = ocp.PyTreeCheckpointer().restore(workdir.absolute() / 'checkpoints' / str(step) / 'params')
  return by_name(jax.tree.map(np.asarray, restored))


def test_every_registry_has_a_section_and_every_plugin_at_most_40_lines():
  for name in ('MODELS', 'MLPS', 'EINSUMS', 'LOSSES', 'METRICS', 'TASKS', 'FORMATS', 'TOKENIZERS', 'TRANSFORMS',
               'SCHEDULES', 'CALLBACKS', 'NORMS', 'ATTENTION', 'EXPORTERS'):
    assert f'register({name}, ' in PAGE, name
  assert len(FILES) == 11
  assert {name: content.count('\n') for name, content in FILES.items() if content.count('\n') > 40} == {}


def test_killed_and_resumed_a_plugin_model_under_a_stock_optimizer_trains_the_same_bits(outputs, folder):
  assert 'resuming from step' in outputs['killed']
  assert 'plug-in causal_conv: edited/causal_conv.py' in outputs['killed'], 'it differs from the one of the run'
  names = ('step', 'train/loss', 'train/grad_norm', 'val/loss')
  killed, whole = ([{name: line.get(name) for name in names} for line in read_metrics(folder / run / 'metrics.jsonl')]
                   for run in ('killed', 'model'))
  assert killed == whole and len(whole) == 30
  assert whole[-1]['train/loss'] < 0.8 * whole[0]['train/loss']
  jax.tree.map(np.testing.assert_array_equal, arrays(folder / 'killed'), arrays(folder / 'model'))
  config = json.loads((folder / 'model' / 'config.json').read_text())
  assert config['model']['width'] == 3 and config['optim']['lamb']['b1'] == 0.8


def test_a_metric(outputs, folder):
  last = read_metrics(folder / 'model' / 'metrics.jsonl')[-1]
  assert last['val/accuracy'] < last['val/top_k_accuracy'] == pytest.approx(last['val/top5_accuracy'])


def test_a_run_needs_its_plugins_named_or_trusted(outputs, folder):
  """Generated from with the files, evaluated from the copies with --trust, refused without."""
  loss = json.loads(outputs['parts'][outputs['parts'].rindex('\n{'):])['loss']
  assert loss == pytest.approx(read_metrics(folder / 'model' / 'metrics.jsonl')[-1]['val/loss'], rel=1e-5)
  named = outputs['killed'][outputs['killed'].rindex('\nthe mat'):]
  assert 'differs' not in named
  with pytest.raises(ConfigError, match=r'^--workdir: .*model was trained with the plug-in causal_conv') as e:
    generate.main([f'--workdir={folder}/model'])
  assert '--plugin=causal_conv.py' in str(e.value) and '--trust' in str(e.value)


def test_an_mlp_an_optimizer_a_schedule_and_a_callback(outputs, folder):
  lines = read_metrics(folder / 'parts' / 'metrics.jsonl')
  assert lines[-1]['train/loss'] < lines[0]['train/loss']
  assert arrays(folder / 'parts')['blocks/mlp/up/w'].shape == (2, 4, 32, 128)
  for layer in ('00', '01'):
    assert 0 <= lines[-1][f'train/blocks/mlp/dropped/{layer}'] < 1
  rates = [line['train/learning_rate'] for line in lines]
  assert rates == pytest.approx([3e-3 * 0.1 ** (step // 3) for step in range(12)])
  written = [line.split(',') for line in (folder / 'losses.csv').read_text().splitlines()]
  assert [(int(step), float(loss)) for step, loss in written] == [(line['step'], line['train/loss']) for line in lines]


def test_a_format_a_tokenizer_a_task_and_a_loss(outputs, folder):
  saved = json.loads((folder / 'parts' / 'tokenizer.json').read_text())
  assert saved['type'] == 'frequent_words' and len(saved['words']) == 20
  assert saved['words'][:4] == ['cat', 'mat', 'of', 'on']
  config = json.loads((folder / 'parts' / 'config.json').read_text())
  assert config['data']['noisy_inputs'] == {'rate': 0.3} and config['loss']['focal']['gamma'] == 1
  lines = read_metrics(folder / 'parts' / 'metrics.jsonl')
  assert lines[-1]['val/loss'] < lines[0]['train/loss']


def test_lora_trains_beside_frozen_weights_of_another_run(outputs, folder):
  base, tuned = arrays(folder / 'parts'), arrays(folder / 'lora')
  thin = {name for name in tuned if 'lora_' in name}
  assert 'of them frozen' in outputs['parts'] and tuned.keys() - thin == base.keys() and len(thin) == 14, thin
  for name, weights in base.items():
    np.testing.assert_array_equal(tuned[name], weights, err_msg=name)
  assert all(np.any(tuned[name]) for name in thin)
  assert tuned['blocks/attn/q/lora_a'].shape == (2, 32, 2)


def test_data_of_an_edited_format_are_made_again(folder, tmp_path):
  def words():
    plugins.load_plugin(str(tmp_path / 'fortune.py'))
    config = DataConfig(path=str(folder / 'fortunes'), format='fortune', tokenizer='byte', cache_dir=str(tmp_path))
    return bytes(open_data(config).train['data'].tokens[1:4].astype(np.uint8))

  (tmp_path / 'fortune.py').write_text(FILES['fortune.py'])
  assert words() == b'cat'
  (tmp_path / 'fortune.py').write_text(FILES['fortune.py'].replace('record.decode()', 'record.decode().upper()'))
  assert words() == b'CAT'

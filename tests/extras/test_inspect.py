"""llm-jax inspect: its counts are complete, and its verdict follows from the thinking steps."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import finish, start, write_config

from llm_jax.base.batch import Batch
from llm_jax.extras.commands.inspect_run import activations, thinking, weights
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model

BYTES = '''
def get_config():
  config = base('byte_patch')
  config.num_steps = 2
  config.batch_tokens = config.tokens_per_device = 128
  config.model.num_layers = 2
  config.model.embed_dim = 16
  config.model.num_heads = 2
  config.data.path = {path!r}
  config.data.tokenizer = 'byte'
  config.data.seq_len = 64
  config.data.mask_documents = False
  config.model.remat = 'full'
  config.model.thinking_steps = 1
  config.eval.sample_tokens = 0
  config.eval.max_tokens = 256
  return config
'''


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  folder = tmp_path_factory.mktemp('inspect')
  write_config(folder)
  text = BYTES.format(path=str(folder / 'corpus'))
  (folder / 'bytes.py').write_text(f'"""Bytes."""\nfrom llm_jax.config import base\n{text}')
  finish(start(folder, 'main', '--config=bytes.py', '--workdir=run'))
  output = finish(start(folder, 'inspect', '--workdir=run', '--tokens=256', '--out=look.png'))
  assert (folder / 'look.png').read_bytes().startswith(b'\x89PNG')
  return json.loads((folder / 'look.json').read_text()), output


@pytest.mark.slow
def test_the_report_covers_all_parameters_and_layers(report):
  found, output = report
  shapes = {name: entry['shape'] for name, entry in found['weights'].items()}
  assert shapes['blocks/near/q/w'] == [2, 16, 2, 8] and shapes['start'] == [16]
  assert len(found['weights']['blocks/near/q/w']['rms']) == 2 and len(found['weights']['start']['rms']) == 1
  total = sum(np.prod(shape) for shape in shapes.values())
  assert f'{total:,.0f} parameters' in output
  for name in ('HybridBlock/near', 'HybridBlock/far', 'HybridBlock/mlp'):
    assert len(found['activations'][name]['rms']) == 2, 'one for each layer'
  assert len(found['activations']['think/mlp']['rms']) == 1, 'one for each thinking step'


@pytest.mark.slow
def test_losses_cover_fewer_and_more_thinking_steps(report):
  found, output = report
  think = found['thinking']
  assert list(think['loss']) == ['0', '1', '2', '3'] and all(np.isfinite(list(think['loss'].values())))
  assert len(think['move']) == len(think['gate']) == 1 and all(0 < gate < 1 for gate in think['gate'])
  assert f'thinking: {think["verdict"]}' in output


@pytest.mark.parametrize(('moves', 'verdict'), [
    ((0.3, 0.2, 0.1), 'active'), ((0.001, 0.001, 0.002), 'dormant'), ((0.5, 1.0, 2.5), 'unstable'),
    ((0.1, np.nan, 0.1), 'unstable')])
def test_the_verdict_follows_from_the_steps(moves, verdict):
  move = np.array(moves)[:, None, None] * np.ones((1, 2, 5))
  assert thinking({'move': move, 'gate': np.full_like(move, 0.5)}, lambda n: 1.0 / (n + 1), 3)['verdict'] == verdict


@pytest.mark.slow
def test_each_call_of_each_module_is_recorded():
  cfg = DecoderConfig(vocab_size=8, max_len=4, num_layers=2, embed_dim=8, num_heads=2, dtype='float32')
  model, tokens = make_model(cfg), jnp.zeros((1, 4), jnp.int32)
  batch = Batch(tokens, tokens, tokens * 1.0)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)['params'])
  params['blocks']['mlp']['down']['w'] = jnp.stack([params['blocks']['mlp']['down']['w'][0] * 0, jnp.ones((32, 8))])
  found, _ = activations(model, params, batch)
  assert {len(found[f'Block/{name}']['rms']) for name in ('attn', 'attn/q', 'mlp', 'mlp/up')} == {2}
  assert found['Block/mlp']['rms'][0] == 0 < found['Block/mlp']['rms'][1] <= found['Block/mlp']['largest'][1]
  assert len(found['final_norm']['rms']) == 1


def test_weights_of_a_stack_are_reported_by_layer():
  params = {'blocks': {'w': np.stack([np.full((3, 3), 2.0), np.full((3, 3), -4.0)])},
            'embed': {'w': np.array([3.0, -4.0])}}
  found = weights(params)
  assert found['blocks/w'] == {'shape': [2, 3, 3], 'parameters': 18, 'rms': [2.0, 4.0], 'largest': [2.0, 4.0]}
  assert found['embed/w']['rms'] == [pytest.approx(12.5**0.5)] and found['embed/w']['largest'] == [4.0]

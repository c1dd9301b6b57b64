"""A hundred bad configs: each is refused in one message, with the field, before JAX starts."""

import time

import pytest

from llm_jax.base.errors import ConfigError
from llm_jax.config_file import open_config

# Fields and values; the message names the last field and its value.
BAD = [
    'optim.learning_rate=1e38',
    'optim.learning_rate=0',
    'optim.learning_rate=inf',
    'optim.adamw.weight_decay=1e38',
    'optim.adamw.eps=1e-60',
    'optim.adamw.eps=1e30',
    'optim.adamw.eps=0',
    'optim.clip_by_global_norm.max_norm=1e38',
    'optim.clip_by_global_norm.max_norm=0',
    'optim.adamw.b2=1',
    'optim.warmup_cosine.end_factor=5',
    'optim.warmup_cosine.end_factor=-1',
    'model.init_std=1e30',
    'model.rope_base=1e60',
    'model.vocab_size=-1',
    'model.vocab_size=0',
    'model.embed_dim=0',
    'model.embed_dim=6000000000',
    'model.num_layers=0',
    'model.num_layers=1000000000',
    'model.dropout=1',
    'model.logit_soft_cap=1e60',
    'model.max_len=1',
    'data.seq_len=0',
    'data.val_fraction=1',
    'data.vocab_size=10',
    'data.vocab_size=100000000000',
    'batch_tokens=0',
    'batch_tokens=100',
    'batch_tokens=-512',
    'tokens_per_device=1',
    'num_steps=0',
    'num_steps=-5',
    'num_steps=10000000000000',
    'num_epochs=1e30',
    'num_epochs=-1',
    'seed=-1',
    'seed=4294967296',
    'mesh.data=0',
    'mesh.data=-2',
    'mesh.fsdp=-1',
    'mesh.tensor=0',
    'mesh.stage=0',
    'mesh.repeats=2',
    'eval.every=-1',
    'eval.max_tokens=0',
    'eval.sample_tokens=-1',
    'eval.temperature=-1',
    'eval.top_k=-1',
    'eval.monitor=val/lss',
    'eval.mode=least',
    'eval.patience=-1',
    'eval.min_delta=-1',
    'eval.num_beams=0',
    'eval.metrics=nope',
    'checkpoint.every=0',
    'checkpoint.every=-1',
    'checkpoint.keep_last=0',
    'checkpoint.keep_best=-1',
    'checkpoint.keep_every=0',
    'log.every=0',
    'log.loggers=tensorbord',
    'log.histograms_every=7',
    'log.callbacks=nope',
    'log.samples=maybe',
    'profile.start=-1',
    'profile.num_steps=0',
    'profile.start=100000',
    'loss.terms=next_tokn',
    'loss.terms=()',
    'loss.next_token.z_loss=1e38',
    'loss.next_token.label_smoothing=1',
    'loss.next_token.weight=0',
    'loss.next_token.weight=-1',
    'loss.balance=nope',
    'optim.chain=skip_spikes',
    'optim.rewarm=5',
    'optim.rewarm=0,0',
    'optim.first_count=2',
    'optim.groups.a.pattern=(',
    'optim.groups.a.pattern=x optim.groups.a.learning_rate=1e38',
    'start.whole=true',
    'start.checkpoint=best',
    'stages.a.begin=0',
    'stages.a.begin=5 stages.a.set=model.num_layers=3',
    'stages.a.begin=5 stages.a.set=nonsense',
    'data.on_bad_record=ignore',
    'data.max_bad_fraction=2',
    'data.max_record_bytes=0',
    'data.cache_max_gb=-1',
    'data.num_workers=-1',
    'data.tokenizer=bp',
    'data.packing=loose',
    'data.format=jsn',
    'data.task=chess',
    'data.sha256=xyz',
    'data.encoding=nope-8',
    'data.dtype=float99',
    'data.stride=0',
    'data.weights_from=5',
    'data.shard_tokens=0',
    'data.path=',
    'model.mlp_dim=0',
    'model.head_dim=0',
    'model.num_kv_heads=0',
    'model.windows=-1',
    'model.scan_unroll=0',
    'model.norm=nope',
    'model.attention=nope',
    'model.dtype=float16',
    'model.remat=some',
    'eval.goal=val/loss',
    'num_steps=1.5',
    'num_steps=many',
    'optim.learning_rate=-1',
    'optim.learning_rate=fast',
    'modle.num_layers=3',
    'model.num_heads=7',
    'optim.adamw.b1=1.5',
    'optim.schedule=cosine',
    'model.name=gpt5',
    'data.task=',
    'optim.sgd.momentum=0.5',
    'model.dropout=-0.1',
    'optim.adamw.mu_dtype=float16',
]


@pytest.fixture(scope='module')
def preset():
  return open_config('gpt_small')


def test_there_are_a_hundred():
  assert len(set(BAD)) >= 100


@pytest.mark.parametrize('text', BAD)
def test_a_bad_config_is_refused(text, preset):
  overrides = dict(entry.split('=', 1) for entry in text.split(' '))
  begin = time.perf_counter()
  with pytest.raises(ConfigError) as e:
    preset.check(overrides)
  seconds, message = time.perf_counter() - begin, str(e.value)
  name, value = list(overrides.items())[-1]
  assert seconds < 2 and e.value.exit_code == 78
  assert message.startswith('config'), message
  assert ODD.get(name, name.split('.')[-1]) in message and len(message.splitlines()) <= 2, message
  numbers = (value, float_of(value), value.replace(',', ', '))
  assert name in ODD or any(x.strip('()').lower()[:12] in message.lower() for x in numbers), message
  assert any(word in message for word in WORDS), message


WORDS = ('must', 'expects', 'known:', 'is not one of', 'did you mean', 'nearest', 'set ', 'neither', 'needs',
         'less than', 'is not a')
# What is named instead of a field: a section that does not exist or has no effect, the part of a list.
ODD = {'modle.num_layers': 'modle', 'optim.sgd.momentum': 'optim: sgd', 'stages.a.set': 'set', 'eval.goal': 'val/loss'}


def float_of(value):
  """A number as Python prints it: 0 is shown as 0.0, 1e38 as 1e+38."""
  try:
    return str(float(value))
  except ValueError:
    return value

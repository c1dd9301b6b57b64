"""Registries, and the config sections that their entries open."""

import dataclasses
import importlib
import json
import subprocess
import sys

import flax.linen as nn
import optax
import pytest
from program import ROOT

from llm_jax.base.builder import Sections, build, sections, to_dict
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError
from llm_jax.base.nearest import nearest
from llm_jax.base.registry import Registry, _registries, register, settings_from_signature
from llm_jax.config import Config, base
from llm_jax.config_file import open_config
from llm_jax.data.formats.registry import FORMATS
from llm_jax.extras.table import TABLE
from llm_jax.infer.export import EXPORTERS
from llm_jax.infer.validators import VALIDATORS
from llm_jax.layers.mlp import MLPS
from llm_jax.losses.config import LOSSES
from llm_jax.losses.metrics import METRICS
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import SCHEDULES, TRANSFORMS


@pytest.fixture
def registered(monkeypatch):
  """A function like register; what it adds is gone after the test."""
  def add(registry, name, value, settings=None):
    monkeypatch.setattr(registry, '_entries', dict(registry._entries))
    register(registry, name, value, settings)

  return add


def fields(settings):
  return {field.name: (field.type, field.default) for field in dataclasses.fields(settings)}


def test_what_is_registered_is_there_at_once():
  registry = Registry('thing')
  register(registry, 'foo', print)
  assert list(registry) == ['foo'] and 'foo' in registry and registry['foo'] is print and len(registry) == 1
  assert registry.origin('foo') == __name__ and 'bar' not in registry
  with pytest.raises(KeyError):
    registry['bar']


def test_a_module_may_register_its_own_name_again_but_no_other_modules():
  registry = Registry('thing')
  register(registry, 'foo', print)
  register(registry, 'foo', len)
  assert registry['foo'] is len
  exec('register(registry, "bar", len)', {'register': register, 'registry': registry, '__name__': 'my_lab'})
  with pytest.raises(ConfigError, match="thing 'bar' is already registered by my_lab; choose another name"):
    register(registry, 'bar', print)


@pytest.mark.parametrize(('registry', 'name', 'by'), [
    (MODELS, 'decoder', 'llm_jax.models.registry'), (TRANSFORMS, 'adamw', 'llm_jax.optim.chain'),
    (MODELS, 'byte_patch', 'llm_jax.extras.byte_patch')])
def test_names_of_the_package_are_taken(registry, name, by):
  """Also those of extras, before any of them is imported."""
  with pytest.raises(ConfigError, match=f"{name}' is already registered by {by}"):
    register(registry, name, len)


def test_a_name_must_be_an_identifier():
  with pytest.raises(ConfigError, match="thing 'my-foo': the name must be a Python identifier"):
    register(Registry('thing'), 'my-foo', len)


def test_unlisted_names_work_but_are_not_offered():
  registry = Registry('thing')
  register(registry, 'foo', len, listed=False)
  assert 'foo' in registry and list(registry) == []


def function(logits, batch, power: float = 2, scale=0.5, name='x', names=('a', 'b'), limit: int | None = None,
             other=None, where=print, flag=False):
  """Parameters of all kinds."""


def test_settings_of_a_function_are_its_parameters_with_plain_defaults():
  assert fields(settings_from_signature(function)) == {
      'power': (float, 2), 'scale': (float, 0.5), 'names': (tuple[str, ...], ('a', 'b')), 'limit': (int | None, None),
      'flag': (bool, False)}


class Squared(nn.Module):
  """A feed-forward layer of the user's."""

  embed_dim: int
  mlp_dim: int
  einsum: object
  out_init: object
  use_bias: bool = False
  power: float = 2.0
  wide: bool = True


def test_settings_of_a_flax_module_are_its_fields_with_plain_defaults(registered):
  registered(MLPS, 'squared', Squared)
  assert fields(MLPS.settings('squared')) == {'power': (float, 2.0), 'wide': (bool, True)}, 'use_bias is the model\'s'
  module = MLPS['squared'](MLPS.settings('squared')(power=3.0))(4, 8, None, None, use_bias=True)
  assert (module.power, module.wide, module.use_bias) == (3.0, True, True)


def test_settings_of_an_optax_function_are_its_parameters(registered):
  registered(TRANSFORMS, 'lamb', optax.lamb)
  found = fields(TRANSFORMS.settings('lamb'))
  assert {'b1': (float, 0.9), 'b2': (float, 0.999), 'weight_decay': (float, 0.0)}.items() <= found.items()
  assert 'learning_rate' not in found and 'mask' not in found
  config = build(Config, {'optim': {'chain': ['lamb'], 'lamb': {'b1': 0.5}}})
  assert config.optim.links[0].b1 == 0.5
  assert isinstance(config.optim.links[0].make(optax.constant_schedule(1.0), {}), optax.GradientTransformation)


@dataclasses.dataclass(frozen=True)
class FocalSettings:
  gamma: float = 2.0

  def __post_init__(self):
    if self.gamma < 0:
      raise ValueError(f'gamma must not be negative; got {self.gamma}')


def test_settings_may_be_a_dataclass_that_checks_itself(registered):
  registered(METRICS, 'focal', lambda logits, batch, gamma: None, FocalSettings)
  assert METRICS.settings('focal') is FocalSettings
  with pytest.raises(ConfigError, match=r'config\.eval\.focal: gamma must not be negative; got -1'):
    build(Config, {'eval': {'metrics': ['focal'], 'focal': {'gamma': -1}}})


REFUSED = [
    ({'eval': {'metrics': ['focal'], 'focal': {'gamma': 'high'}}},
     "config.eval.focal.gamma: expects a number, got 'high'"),
    ({'eval': {'metrics': ['focal'], 'focal': {'gama': 1}}}, 'config.eval.focal.gama: no such field; did you mean '
     'config.eval.focal.gamma?'),
    ({'eval': {'focal': {'gamma': 1}}}, 'config.eval: focal is set, but neither metrics nor answer_metrics names it'),
    ({'eval': {'metrics': ['foca']}}, "metrics names 'foca', which is unknown; known: focal (did you mean 'focal'?)"),
    ({'optim': {'chain': ['adamv']}}, "chain names 'adamv', which is unknown"),
    ({'optim': {'chain': ['adamww']}}, "(did you mean 'adamw'?)"),
    ({'optim': {'adamww': {'b1': 1}}}, 'config.optim.adamww: no such field; did you mean config.optim.adamw?'),
    ({'model': {'name': 'decodr'}}, "config.model.name: 'decodr' is unknown; known: decoder, encdec, byte_patch (did "
     "you mean 'decoder'?)"),
    ({'model': {'name': 'encdec', 'num_layer': 3}}, 'did you mean config.model.num_layers?'),
    ({'loss': {'terms': ['next_tokn']}}, "(did you mean 'next_token'?)"),
    ({'optim': {'schedule': 'warmup_cosin'}}, "(did you mean 'warmup_cosine'?)"),
    ({'loss': {'terms': ['next_token', 'classification'], 'balance': 'uncertanty'}}, "(did you mean 'uncertainty'?)"),
    ({'model': {'mlp': 'swiglo'}}, "(did you mean 'swiglu'?)"),
]


@pytest.mark.parametrize(('values', 'words'), REFUSED, ids=[words[:60] for _, words in REFUSED])
def test_a_wrong_name_or_value_in_a_section_is_named_with_the_nearest(values, words, registered):
  registered(METRICS, 'focal', lambda logits, batch, gamma: None, FocalSettings)
  with pytest.raises(ConfigError) as e:
    build(Config, values)
  assert words in str(e.value)


def test_the_command_line_sets_the_section_of_an_entry(registered, tmp_path):
  registered(CALLBACKS, 'tell', lambda event, host='here', port=80: None)
  path = tmp_path / 'c.py'
  path.write_text('from llm_jax.config import base\n\ndef get_config():\n  return base()\n')
  source = open_config(path)
  config = source.resolve({'log.callbacks': 'tell', 'log.tell.port': '81'}, cpu_only=False)
  assert vars(config.log.sections['tell']) == {'host': 'here', 'port': 81}
  for overrides, words in [
      ({'log.tell.prt': '1'}, r'config\.log\.tell\.prt: no such field; did you mean config\.log\.tell\.port\?'),
      ({'log.tell.port': 'x'}, r"config\.log\.tell\.port: expects a whole number, got 'x'"),
      ({'log.tel.port': '1'}, r'config\.log\.tel: no such field; did you mean config\.log\.tell\?')]:
    with pytest.raises(ConfigError, match=words):
      source.resolve({'log.callbacks': 'tell', **overrides}, cpu_only=False)


def test_sections_come_back_from_json_with_their_types(registered):
  registered(METRICS, 'focal', lambda logits, batch, gamma: None, FocalSettings)
  registered(TRANSFORMS, 'lamb', optax.lamb)
  registered(SCHEDULES, 'steep', lambda peak_value, num_steps, power=2.0: lambda step: peak_value)
  config = build(Config, {
      'model': {'name': 'encdec', 'num_layers': 2}, 'data': {'task': 'classification'},
      'eval': {'metrics': ['focal'], 'focal': {'gamma': 3}},
      'loss': {'terms': ['next_token', 'classification'], 'classification': {'weight': 0.5}},
      'optim': {'chain': ['lamb', 'ema'], 'schedule': 'steep', 'lamb': {'b1': 0.5}, 'steep': {'power': 1}}})
  values = json.loads(json.dumps(to_dict(config)))
  assert values['optim']['lamb']['b1'] == 0.5 and 'sections' not in values['optim'] and 'adamw' not in values['optim']
  again = build(Config, values)
  assert again == config and hash(again.optim.sections) == hash(config.optim.sections)
  assert type(again.eval.sections['focal']) is FocalSettings and again.eval.sections['focal'].gamma == 3.0
  assert type(again.optim.sections['steep'].power) is float


def test_base_opens_the_section_of_a_registered_name(registered):
  registered(METRICS, 'focal', lambda logits, batch, gamma: None, FocalSettings)
  config = base()
  config.optim.muon.beta = 0.9
  config.eval.focal.gamma = 1.0
  assert 'lion' not in config.optim and config.optim.lion.b1 == TRANSFORMS.settings('lion')().b1
  for section, name in ((config.optim, 'mouon'), (config.eval, 'fokal'), (config.model, 'adamw')):
    with pytest.raises(AttributeError):
      getattr(section, name)
  with pytest.raises((AttributeError, KeyError)):
    config.optim.muon.beta1 = 0.9
  with pytest.raises((AttributeError, KeyError)):
    config.eval.fokal = {}
  config.optim.chain, config.eval.metrics = ('muon',), ('focal',)
  built = build(Config, config.to_dict())
  assert (built.optim.links[0].beta, built.eval.sections['focal'].gamma) == (0.9, 1.0)


def test_a_dataclass_has_sections_of_its_registries_only():
  registry = Registry('thing')
  register(registry, 'foo', function)

  @dataclasses.dataclass(frozen=True)
  class Part:
    size: int = 1
    sections: Sections = sections(registry)

  part = build(Part, {'size': 2, 'foo': {'power': 3}}, 'part')
  assert part.sections['foo'].power == 3.0 and to_dict(part)['foo']['flag'] is False
  with pytest.raises(ConfigError, match=r'part\.fo: no such field; did you mean part\.foo\?'):
    build(Part, {'fo': {}}, 'part')


def test_extras_are_found_by_name_and_imported_no_earlier():
  """In a process of its own: importing the core, listing all names and building a config imports no extra."""
  code = '''
import sys
import llm_jax.api
import llm_jax.data.formats.registry
from llm_jax.base.builder import build
from llm_jax.base.registry import _registries
from llm_jax.config import Config, base
from llm_jax.losses.config import LOSSES
Config(), base()
listed = [name for registry in _registries for name in registry]
assert {'byte_patch', 'bitnet', 'classification', 'soap', 'parquet', 'wgsl', 'adamw'} <= set(listed), listed
assert 'classification' in LOSSES
def extras(): return {name for name in sys.modules if name.startswith('llm_jax.extras.')} - {'llm_jax.extras.table'}
assert not extras(), extras()
LOSSES.settings('classification')()
assert LOSSES.origin('classification') == 'llm_jax.extras.labels'
assert extras() == {'llm_jax.extras.labels'}, extras()
'''
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_every_line_of_the_table_of_extras_is_true():
  for module in ('llm_jax.hf.family', 'llm_jax.infer.harness', 'llm_jax.infer.importers'):
    importlib.import_module(module)  # whose registries nothing else here imports
  by_kind = {registry.kind: registry for registry in _registries}
  assert {FORMATS, EXPORTERS, VALIDATORS} <= {*_registries}, 'all are imported'
  for kind, names in TABLE.items():
    for name, module in names.items():
      assert name in by_kind[kind]
      whole = module if module.startswith('llm_jax.') else f'llm_jax.extras.{module}'
      assert by_kind[kind].origin(name) == whole, (kind, name)


def test_losses_of_the_user_are_terms(registered):
  registered(LOSSES, 'focal', lambda logits, batch, gamma=2.0: (logits[..., 0], batch.loss_mask))
  config = build(Config, {'loss': {'terms': ['next_token', 'focal'], 'focal': {'gamma': 1, 'weight': 0.1}}})
  assert (config.loss.sections['focal'].gamma, config.loss.sections['focal'].weight) == (1.0, 0.1)


@pytest.mark.parametrize(('registry', 'name', 'near'), [
    (SCHEDULES, 'cosine', 'warmup_cosine'), (SCHEDULES, 'cosine_warmup', 'warmup_cosine'),
    (SCHEDULES, 'poly', 'polynomial'), (SCHEDULES, 'compsite', 'composite'), (TRANSFORMS, 'AdamW', 'adamw'),
    (TRANSFORMS, 'adamww', 'adamw'), (TRANSFORMS, 'plateau', 'reduce_on_plateau'), (TRANSFORMS, 'sgd_momentum', 'sgd'),
    (FORMATS, 'json_lines', 'jsonl'), (MLPS, 'silu', 'swiglu'), (MODELS, 'xyz', None)])
def test_the_nearest_name_shares_words_before_letters(registry, name, near):
  assert nearest(name, registry) == near


def test_a_message_on_unknown_names_says_once_how_a_plug_in_is_loaded():
  for values in ({'optim': {'chain': ['foo']}}, {'model': {'name': 'foo'}}, {'data': {'tokenizer': 'foo'}},
                 {'data': {'task': 'foo'}, 'loss': {'terms': ['foo']}, 'model': {'norm': 'foo'}}):
    with pytest.raises(ConfigError) as error:
      build(Config, values)
    assert str(error.value).count('--plugin=FILE') == 1
  for values in ({'model': {'remat': 'foo'}}, {'data': {'packing': 'foo'}}):  # no plug-in can add one
    with pytest.raises(ConfigError) as error:
      build(Config, values)
    assert '--plugin' not in str(error.value)

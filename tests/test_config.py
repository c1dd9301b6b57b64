"""What configs accept and reject, the error messages, and that all shipped configs build."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from llm_jax import config as config_lib
from llm_jax import main
from llm_jax.base.builder import build, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.config import Config, base
from llm_jax.config_file import open_config
from llm_jax.data.open import Data
from llm_jax.data.pipeline import example_batch
from llm_jax.losses.config import make_objective
from llm_jax.models.registry import make_model
from llm_jax.training.resolve import resolve as resolve_config

CONFIGS = Path(__file__).parent.parent / 'configs'


def resolve(text='', *overrides, tmp_path, cpu_only=False):
  path = tmp_path / 'c.py'
  path.write_text(f'from llm_jax.config import base\ndef get_config():\n  config = base()\n  {text or "pass"}\n'
                  '  return config\n')
  return open_config(path).resolve(main.parser().parse([f'--config={path}', *overrides]).overrides, cpu_only=cpu_only)


BAD = [  # overrides, and words that the message must contain: the path, the value, legal values
    (['--config.modle.num_layers=3'], ['config.modle', 'config.model']),
    (['--config.model.num_layer=3'], ['config.model.num_layer', 'config.model.num_layers']),
    (['--config.optim.adamw.beta1=0.9'], ['config.optim.adamw.beta1', 'b1']),
    (['--config.nonsense=1'], ['config.nonsense', 'num_steps']),
    (['--config.model.num_layers=three'], ['config.model.num_layers', 'whole number', 'three']),
    (['--config.num_steps=1.5'], ['config.num_steps', 'whole number', '1.5']),
    (['--config.num_steps=1e4'], ['config.num_steps', '1e4']),
    (['--config.num_steps=true'], ['config.num_steps', 'true']),
    (['--config.optim.learning_rate=nan'], ['config.optim.learning_rate', 'nan']),
    (['--config.optim.learning_rate=-1'], ['learning_rate', '-1']),
    (['--config.optim.learning_rate=fast'], ['config.optim.learning_rate', 'fast']),
    (['--config.optim.adamw.b1=1.5'], ['config.optim.adamw', '1.5']),
    (['--config.optim.chain=adamm'], ['config.optim', 'adamm', 'adamw']),
    (['--config.optim.schedule=cosine'], ['cosine', 'warmup_cosine']),
    (['--config.optim.constant.warmup_steps=5'], ['constant', 'no effect']),
    (['--config.optim.schedule=constant', '--config.optim.constant.warmup_steps=-1'], ['warmup_steps', '-1']),
    (['--config.optim.chain=clip_by_global_norm'], ['one optimizer', 'adamw']),
    (['--config.optim.chain=()'], ['one optimizer', 'adamw']),
    (['--config.loss.next_token.z_loss=-1'], ['z_loss', '-1']),
    (['--config.loss.next_token.label_smoothing=1'], ['label_smoothing', '[0, 1)']),
    (['--config.model.rope_base=0'], ['rope_base', '0']),
    (['--config.model.init_std=-1'], ['init_std', '-1']),
    (['--config.model.logit_soft_cap=-3'], ['logit_soft_cap', '-3']),
    (['--config.model.name=gpt5'], ['config.model.name', 'gpt5', 'decoder']),
    (['--config.model.num_heads=7'], ['num_heads 7', 'embed_dim 768', '6, 8']),
    (['--config.model.num_kv_heads=5'], ['num_kv_heads 5', '12']),
    (['--config.model.positions=sine'], ['config.model.positions', 'sine', 'learned', 'rope']),
    (['--config.model.mlp=rellu'], ['relu', 'swiglu']),
    (['--config.model.dropout=1'], ['dropout', '[0, 1)']),
    (['--config.model.windows=0,-128'], ['windows', '-128']),
    (['--config.model.rope_bases=1e4,0'], ['rope_bases', 'positions=rope']),
    (['--config.model.positions=rope', '--config.model.rope_dim=7'], ['rope_dim', '7']),
    (['--config.model.rope_scaling=ntk'], ['rope_scaling', 'rope_dynamic']),
    (['--config.model.vocab_multiple=8', '--config.loss.next_token.label_smoothing=0.1'], ['label_smoothing', '8']),
    (['--config.model.dtype=float16'], ['config.model.dtype', 'float16', 'bfloat16']),
    (['--config.model.max_len=512'], ['max_len 512', '1024']),
    (['--config.batch_tokens=1000'], ['batch_tokens 1000', '1024', '2048']),
    (['--config.tokens_per_device=512'], ['tokens_per_device 512', '1024']),
    (['--config.data.tokenizer=wordpiece'], ['wordpiece', 'bpe']),
    (['--config.data.val_fraction=1.5'], ['val_fraction', '1.5']),
    (['--config.data.mask_documents=maybe'], ['config.data.mask_documents', 'true or false', 'maybe']),
    (['--config.data=stdlib'], ['config.data', 'section']),
    (['--config.num_steps.deep=1'], ['config.num_steps', 'not a section']),
    (['--config.mesh.data=0'], ['config.mesh', '0']),
    (['--config.mesh.data=-1', '--config.mesh.fsdp=-1'], ['config.mesh', 'at most one -1']),
    (['--config.eval.every=-1'], ['config.eval', 'every']),
    (['--config.eval.every=0', '--config.eval.patience=2'], ['config.eval', 'every is 0', 'patience']),
    (['--config.checkpoint.keep_last=0'], ['config.checkpoint', 'keep_last']),
    (['--config.seed=-1'], ['seed', '-1']),
    (['--confg.seed=1'], ['--confg.seed=1', '--config']),
    (['--config.seed'], ['--config.seed', 'no value']),
]


@pytest.mark.parametrize(('overrides', 'words'), BAD, ids=[' '.join(o) for o, _ in BAD])
def test_bad_values_are_reported_with_path_and_legal_values(overrides, words, tmp_path):
  with pytest.raises(ConfigError) as e:
    resolve('', *overrides, tmp_path=tmp_path)
  for word in words:
    assert word in str(e.value)


def test_all_problems_are_reported_at_once(tmp_path):
  with pytest.raises(ConfigError) as e:
    resolve('', '--config.model.num_layer=3', '--config.num_steps=x', '--config.eval.every=-1', tmp_path=tmp_path)
  for word in ('num_layer', 'num_steps', 'eval'):
    assert word in str(e.value)


@pytest.mark.parametrize(('line', 'words'), [
    ('config.model.num_layer = 3', ['c.py', 'num_layer']),
    ('config.num_steps = "many"', ['c.py', 'many']),
    ('1 / 0', ['c.py', 'ZeroDivisionError']),
    ('return None', ['c.py', 'NoneType']),
])
def test_a_mistake_in_the_file_names_the_file(line, words, tmp_path):
  with pytest.raises(ConfigError) as e:
    resolve(line, tmp_path=tmp_path)
  for word in words:
    assert word in str(e.value)


def test_a_missing_file_is_reported_with_known_ones():
  with pytest.raises(ConfigError, match='gpt_small'):
    open_config(CONFIGS / 'gpt_smal.py')


def leaves(values, path=()):
  for name, value in values.items():
    yield from leaves(value, (*path, name)) if isinstance(value, dict) else [((*path, name), value)]


@pytest.mark.parametrize(('path', 'value'), list(leaves(to_dict(Config()))), ids=lambda v: str(v)[:40])
def test_every_field_can_be_set_from_the_command_line(path, value, tmp_path):
  """Each default, written as text, is parsed to the same value of the same type."""
  text = '()' if value == [] else ','.join(map(str, value)) if isinstance(value, list) else str(value)
  config = resolve('', f'--config.{".".join(path)}={text}', tmp_path=tmp_path)
  assert config == Config()


def test_command_line_values_get_the_type_of_their_field(tmp_path):
  config = resolve('', '--config.optim.learning_rate', '1', '--config.model.windows=(128,0)', '--config.data.path=1234',
                   '--config.model.qk_norm=True', '--config.eval.prompts=a b,c', '--config.model.num_kv_heads=4',
                   '--config.checkpoint.keep_every=none', tmp_path=tmp_path)
  assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
  assert config.model.windows == (128, 0) and config.data.path == '1234' and config.model.qk_norm is True
  assert config.eval.prompts == ('a b', 'c') and config.model.num_kv_heads == 4 and config.checkpoint.keep_every is None


def test_command_line_overrides_on_cpu_overrides_file(tmp_path):
  path = tmp_path / 'c.py'
  path.write_text('from llm_jax.config import base\ndef get_config():\n  c = base()\n  c.num_steps = 7\n  c.seed = 7\n'
                  '  return c\ndef on_cpu(c):\n  c.num_steps = 8\n  c.log.every = 8\n')
  source = open_config(path)
  assert (source.resolve({}, cpu_only=False).num_steps, source.resolve({}, cpu_only=True).num_steps) == (7, 8)
  config = source.resolve({'num_steps': '9'}, cpu_only=True)
  assert (config.num_steps, config.seed, config.log.every) == (9, 7, 8)


def test_a_json_round_trip_builds_the_same_config():
  config = open_config(CONFIGS / 'gpt_small.py').resolve({'model.windows': '(0,64)'}, cpu_only=True)
  assert build(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_config_json_is_not_executed(tmp_path):
  (tmp_path / 'config.json').write_text('__import__("os").abort()')
  with pytest.raises(ConfigError, match='not valid JSON'):
    open_config(tmp_path / 'config.json')


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().num_steps = 3


@pytest.mark.parametrize(('rows', 'shards', 'held', 'expected'), [
    (512, 1, 32, (32, 16)), (512, 8, 32, (32, 2)), (12, 1, 8, (6, 2)), (7, 1, 4, (1, 7)), (8, 8, 99, (1, 1))])
def test_batches_split_exactly(rows, shards, held, expected):
  config = build(Config, {'batch_tokens': rows * 64, 'tokens_per_device': held * 64, 'data': {'seq_len': 64}})
  assert config.split_batch(shards) == expected
  assert expected[0] * expected[1] * shards == rows


def test_an_indivisible_batch_is_reported_with_nearest_sizes():
  config = build(Config, {'batch_tokens': 30 * 64, 'tokens_per_device': 64, 'data': {'seq_len': 64}})
  with pytest.raises(ConfigError, match=f'{24 * 64}, {32 * 64}'):
    config.split_batch(8)


def test_base_rejects_unknown_names():
  with pytest.raises(AttributeError, match='num_layer'):
    base().model.num_layer = 3


# Golden: a change here changes what a checkpoint of this config means, so change it only on purpose.
PARAMETERS = {
    'bytes_small': (6_772_288, 6_772_288),
    'bytes_large': (107_223_744, 107_223_744),
    'enwik8_bytes': (48_280_704, 48_280_704),
    'gpt_small': (124_373_760, 3_368_640),
    'bitnet': (3_368_640, 3_368_640),
    'my_data': (29_893_120, 2_551_200),
    'seq2seq_wgsl': (44_243_968, 965_888),
    'chat_small': (902_016, 902_016),
    'package': (689_026, 689_026),
    'grokking': (419_712, 419_712),
    'optimizer_race': (950_912, 950_912),
    'half_time': (950_912, 950_912),
    'duration': (250_176, 250_176),  # no head: it has as many outputs as the labels have numbers
    'search': (266_912, 266_912),
    'spans': (1_250_816, 1_250_816),
    'masked': (688_896, 688_896),
    'distill_char': (106_944, 106_944),
    'shakespeare_char': (804_224, 804_224),
    'llama_1b': (1_235_814_400, 3_147_456),
    'llama_8b': (8_030_261_248, 4_720_320),
    'llama_70b': (70_553_706_496, 4_720_320),
}


@pytest.mark.parametrize(('path', 'cpu_only'), [
    pytest.param(path, cpu_only, id=f'{path.stem}-{"on_cpu" if cpu_only else "full"}',
                 marks=pytest.mark.slow if cpu_only and len(set(PARAMETERS.get(path.stem, ()))) == 1 else ())
    for path in sorted(CONFIGS.glob('*.py')) for cpu_only in (False, True)])  # the same model is built once
def test_shipped_configs_have_their_parameter_counts(path, cpu_only):
  assert path.read_text().startswith('"""'), 'a config opens with its command and expected result'
  config = open_config(path).resolve({'eval.answers': '0'}, cpu_only=cpu_only)
  vocab_size = {'char': 66, 'byte': 257, 'bpe': config.data.vocab_size, 'word': 246, 'none': 99}[config.data.tokenizer]
  config = resolve_config(config, Data({split: {} for split in ('train', 'val', 'test')}, None, vocab_size))
  objective = make_objective(config.loss)
  model = make_model(config.model, objective.heads, objective.num_weights)
  shapes = jax.eval_shape(model.init, jax.random.key(0), example_batch(config.data))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes['params'])) == PARAMETERS[path.stem][cpu_only]


def test_differences_name_each_leaf():
  found = config_lib.differences({'a': {'b': 1, 'c': 2}, 'd': 3}, {'a': {'b': 1, 'c': 5}})
  assert found == {'a.c': (2, 5), 'd': (3, None)}


def test_replaced_links_and_schedules_lose_their_settings(tmp_path):
  """Settings from the file are removed; settings from the command line must have an effect."""
  text = 'config.optim.warmup_cosine.warmup_steps = 7; config.optim.adamw.b2 = 0.9'
  optim = resolve(text, '--config.optim.schedule=one_cycle', tmp_path=tmp_path).optim
  assert 'warmup_cosine' not in optim.sections and optim.sections['adamw'].b2 == 0.9
  composite = ['schedule=composite', 'composite.boundaries=5', 'composite.parts=constant,warmup_cosine', 'chain=lion']
  optim = resolve(text, *[f'--config.optim.{flag}' for flag in composite], tmp_path=tmp_path).optim
  assert optim.sections['warmup_cosine'].warmup_steps == 7 and 'adamw' not in optim.sections
  with pytest.raises(ConfigError, match='warmup_cosine is set, but'):
    resolve(text, '--config.optim.schedule=one_cycle', '--config.optim.warmup_cosine.warmup_steps=7', tmp_path=tmp_path)

"""Answers to prompts: pairs read from rows, validators, and a run that learns answers and is evaluated."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_runs import write_pair_config, write_pairs

from llm_jax import main
from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError
from llm_jax.commands import evaluate, generate
from llm_jax.config import EvalConfig
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.rows.tasks import PromptAnswer
from llm_jax.data.stores.store import TokenStore
from llm_jax.extras.tasks import Seq2Seq
from llm_jax.infer.answers import Answer, answer, pairs, summarize_answers
from llm_jax.infer.validators import VALIDATORS, make_validator
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.training.log import read_metrics

SETTINGS = {
    'num_steps': 400, 'batch_tokens': 64, 'tokens_per_device': 64, 'data.task': 'seq2seq', 'data.seq_len': 8,
    'data.encoder_len': 8, 'data.test_fraction': 0.2, 'optim.learning_rate': 3e-2, 'eval.every': 5, 'eval.patience': 2,
    'eval.answers': 8, 'eval.validator': 'python', 'eval.answer_metrics': ('word_f1',), 'eval.prompts': ('a b',),
    'eval.capabilities': ('val/word_f1 > 0.01', 'val/valid >= 0'),
    'checkpoint.every': 1000, 'checkpoint.keep_best': 0}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('answers')
  pairs = write_pairs(folder / 'pairs.jsonl', [(f'{a} {b}', f'{b} {a}') for a in 'abcdefgh' for b in 'abcdefgh'])
  write_pair_config(folder / 'backwards.py', pairs, 'encdec', SETTINGS)
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    main.main([f'--config={folder}/backwards.py', f'--workdir={folder}/run'])
  return folder, printed.getvalue()


def test_patience_ends_the_run_and_is_reported(run, capsys):
  folder, output = run
  lines = [line for line in read_metrics(folder / 'run' / 'metrics.jsonl') if 'val/loss' in line]
  losses, last = [line['val/loss'] for line in lines], lines[-1]['step']
  best = int(np.argmin(losses))
  assert last < 400 and len(losses) - 1 - best == 2, 'two evaluations after the best one'
  assert f'step {last}: the run ends: val/loss has not improved for 2 evaluations' in output
  steps = {int(path.name) for path in (folder / 'run' / 'checkpoints').iterdir() if path.name.isdigit()}
  assert steps == {last}, 'no checkpoint is needed to know the best'
  assert {'val/exact_match', 'val/answer_accuracy', 'val/valid', 'val/word_f1'} <= lines[-1].keys()
  main.main([f'--config={folder}/backwards.py', f'--workdir={folder}/run'])
  assert '(config.eval.patience); to continue, change that setting' in capsys.readouterr().out


def test_evaluate_writes_answers_of_the_test_split(run, capsys, tmp_path):
  folder, _ = run
  evaluate.main([f'--workdir={folder}/run', '--split=test', '--num_beams=2', f'--out={tmp_path}/result.json'])
  printed = capsys.readouterr().out
  report = json.loads(printed[printed.index('{'):])
  answers = [json.loads(line) for line in (tmp_path / 'answers.jsonl').read_text().splitlines()]
  held = [line for line in (folder / 'pairs.jsonl').read_text().splitlines()]
  assert report['data'] == 'test part' and 3 <= len(answers) < len(held) / 2
  for a in answers:
    assert json.dumps({'text': a['prompt'], 'answer': a['expected']}) in held
    assert a['exact'] == (a['given'] == a['expected'])
    assert a['valid'] == make_validator('python')(a['given'])
  assert report['exact_match'] == np.mean([a['exact'] for a in answers])
  assert report['valid'] == np.mean([a['valid'] for a in answers])
  assert report['exact_match'] <= report['word_f1'] <= 1


def test_generate_answers_with_beam_search(run, capsys):
  folder, _ = run
  generate.main([f'--workdir={folder}/run', '--prompt=a b', '--num_beams=3'])
  output = capsys.readouterr().out
  assert output.split() and set(output.split()) <= set('abcdefgh'), 'an answer, without its prompt'


def test_answers_need_a_task_with_answers(run, tmp_path):
  folder, _ = run
  with pytest.raises(ConfigError, match=r'eval\.answers'):
    main.main([f'--config={folder}/backwards.py', f'--workdir={tmp_path}', '--config.data.task=span_corruption',
               '--config.data.span_corruption.num_sentinels=8'])
  with pytest.raises(ConfigError, match=r'eval\.answer_metrics: word_f1 needs a task with answers.* span_corruption'):
    main.main([f'--config={folder}/backwards.py', f'--workdir={tmp_path}', '--config.data.task=span_corruption',
               '--config.data.span_corruption.num_sentinels=8', '--config.eval.answers=0',
               '--config.eval.capabilities=()'])
  with pytest.raises(ConfigError, match='encoder_tokens'):
    main.main([f'--config={folder}/backwards.py', f'--workdir={tmp_path}', '--config.data.task=prompt_answer'])


def store(documents):
  """A store of (prompt, answer) documents with bos 0 and eos 1."""
  tokens = [[0, *prompt, *answer, 1] for prompt, answer in documents]
  return TokenStore(tokens=np.concatenate(tokens).astype(np.uint16), starts=np.cumsum([0, *map(len, tokens[:-1])]),
                    answers=np.array([1 + len(prompt) for prompt, _ in documents]), sha256='', num_bytes=0.0)


@pytest.mark.parametrize(('task', 'packing'), [
    (Seq2Seq(), 'pad'), (PromptAnswer(), 'pad'), (PromptAnswer(), 'best_fit')])
def test_pairs_are_read_back_from_the_store(task, packing):
  documents = [([5, 6], [7]), ([8], [9, 10, 11]), ([12, 13, 14], [15, 16])]
  examples = make_examples(store(documents), task=task, seq_len=12, encoder_len=6, packing=packing, vocab_size=20,
                           bos_id=0, eos_id=1)
  first = [[*prompt, 1] if task.encodes else [0, *prompt] for prompt, _ in documents]
  assert sorted(pairs(examples, 1, None)) == sorted(zip(first, [answer for _, answer in documents], strict=True))


def test_answers_are_summarized_as_means():
  answers = [Answer('', 'a', 'a', True, 1.0, True), Answer('', 'ab', 'a', False, 0.5, False)]
  assert summarize_answers(answers, EvalConfig()) == {'exact_match': 0.5, 'answer_accuracy': 0.75, 'valid': 0.5}
  assert 'valid' not in summarize_answers([a._replace(valid=None) for a in answers], EvalConfig())


GOOD = {'python': 'x = 1\nprint(x)', 'json': '{"a": [1, 2]}',
        'wgsl': 'fn f(a: vec3<f32>) -> f32 {\n  return dot(a, a);\n}'}
BAD = {'python': ['x = = 1', '"\0"'], 'json': ['{"a": }', ''],
       'wgsl': ['fn f(a: vec3<f32>) -> f32 {\n  return dot(a, a)\n}', 'hello', '', GOOD['wgsl'][:-1]]}


@pytest.mark.parametrize('name', VALIDATORS)
def test_validators_reject_bad_text(name):
  valid = make_validator(name)
  assert valid(GOOD[name])
  assert not any(valid(text) for text in BAD[name])


@pytest.mark.skipif(shutil.which('grep') is None, reason='the command of this test')
def test_a_command_can_be_a_validator():
  valid = make_validator('grep -q "two words"')
  assert valid('here are two words') and not valid('here are two  words')
  assert make_validator('') is None
  for name in ('no_such_program --fast', ' ', "grep 'x"):
    with pytest.raises(ConfigError, match=r'eval\.validator'):
      make_validator(name)


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_batch():
  """A long prompt in the batch, even one that fills the row, does not shorten the answer to a short one."""
  documents = [([5], list(range(5, 14))), (list(range(5, 14)), [5])]
  model = make_model(DecoderConfig(vocab_size=20, max_len=10, num_layers=1, embed_dim=8, num_heads=2, dtype='float32'))
  blank = jnp.zeros((1, 10), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), Batch(blank, blank, blank * 1.0))['params']
  tokenizer = SimpleNamespace(eos_id=1, token_bytes=[b''] * 2 + [bytes([97 + i]) for i in range(18)])

  def answers(documents):
    examples = make_examples(store(documents), task=PromptAnswer(), seq_len=10, packing='pad', vocab_size=20, bos_id=0,
                             eos_id=1)
    return {a.prompt: a.given for a in answer(model, nn.unbox(params), examples, tokenizer, limit=None, num_beams=1,
                                              validator=None)}

  alone = answers(documents[:1])
  assert len(next(iter(alone.values()))) > 2, 'the model goes on for a while'
  assert answers(documents).items() >= alone.items()

"""Tasks of lm_eval: the arithmetic against a plain forward pass, and real tasks where the package is installed."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from program import write_config

import llm_jax
from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.commands import evaluate
from llm_jax.config import Config
from llm_jax.data.tokenizers.tokenizer import ByteTokenizer, decode
from llm_jax.extras import lm_harness, lm_scores
from llm_jax.extras.lm_scores import Decoding, Scorer, rolling_windows, split_pair
from llm_jax.infer.load import Loaded
from llm_jax.models.registry import make_model
from llm_jax.training.log import read_metrics

MAX_LEN, BOS = 48, 256
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@functools.cache
def loaded():
  """A tiny decoder over bytes with large random weights, as a run."""
  config = build(Config, {
      'batch_tokens': MAX_LEN, 'data': {'seq_len': MAX_LEN}, 'model': {
          'vocab_size': 260, 'max_len': MAX_LEN, 'num_layers': 2, 'embed_dim': 32, 'num_heads': 2, 'dtype': 'float32',
          'init_std': 0.3, 'tie_embeddings': False}})
  model = make_model(config.model, (), 0)
  tokens = np.zeros((1, MAX_LEN), np.int32)
  params = model.init(jax.random.key(0), Batch(tokens=tokens, targets=tokens, loss_mask=np.ones((1, MAX_LEN))))
  return Loaded(config, ByteTokenizer(), None, model, jax.tree.map(
      lambda x: x.unbox() if hasattr(x, 'unbox') else x, params['params'], is_leaf=lambda x: hasattr(x, 'unbox')), {})


@functools.cache
def plain_forward():
  run = loaded()
  return jax.jit(lambda batch: jax.nn.log_softmax(run.model.apply({'params': run.params}, batch)))


def plain_score(before, after):
  """log p of a continuation by one forward pass over one row, and whether each token is the argmax."""
  ids = [*before, *after][-(MAX_LEN + 1):]
  tokens = np.zeros((1, MAX_LEN), np.int32)
  tokens[0, :len(ids) - 1] = ids[:-1]
  log_p = np.asarray(plain_forward()(Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape))))[0]
  places = range(len(ids) - 1 - len(after), len(ids) - 1)
  return (sum(float(log_p[i, ids[i + 1]]) for i in places), all(log_p[i].argmax() == ids[i + 1] for i in places))


def mesh_of(num_devices):
  return make_mesh(MeshConfig(), jax.devices()[:num_devices])


def random_pairs(seed, count):
  rng = np.random.default_rng(seed)
  return [([BOS, *rng.integers(0, 256, rng.integers(0, 60)).tolist()],
           rng.integers(0, 256, rng.integers(1, 20)).tolist()) for _ in range(count)]


@pytest.mark.parametrize(('num_devices', 'rows', 'tokens'), [(1, 32, 8192), (2, 4, 8192), (8, 1, 1)])
def test_log_likelihoods_are_those_of_a_plain_forward_pass(num_devices, rows, tokens, monkeypatch):
  monkeypatch.setattr(lm_scores, 'ROWS', rows)
  monkeypatch.setattr(lm_scores, 'TOKENS', tokens)
  pairs = random_pairs(0, 21)
  with jax.set_mesh(mesh := mesh_of(num_devices)):
    run = dataclasses.replace(loaded(), params=jax.device_put(loaded().params, NamedSharding(mesh, PartitionSpec())))
    found = Scorer(run, mesh).score(pairs)
  for score, pair in zip(found, pairs, strict=True):
    expected, greedy = plain_score(*pair)
    assert score.log_p == pytest.approx(expected, abs=2e-4) and score.greedy == greedy


def test_a_greedy_continuation_is_reported_as_greedy_and_is_what_generation_gives():
  mesh, run = mesh_of(1), loaded()
  prompts = [[BOS, *b'abc'], [BOS, *b'a longer prompt'], [BOS]]
  with jax.set_mesh(mesh):
    scorer = Scorer(run, mesh)
    texts = scorer.generate(prompts, Decoding(num_tokens=6))
    for prompt, text in zip(prompts, texts, strict=True):
      ids = list(prompt)
      for _ in range(6):
        ids.append(int(np.argmax(next_log_p(ids)[:257])))
      expected = ids[len(prompt):]
      expected = expected[:expected.index(BOS)] if BOS in expected else expected
      assert text == decode(run.tokenizer, expected)
      [score] = scorer.score([(prompt, ids[len(prompt):])])
      assert score.greedy or max(ids) >= 257
      ids[-1] = (ids[-1] + 1) % 256
      assert not scorer.score([(prompt, ids[len(prompt):])])[0].greedy


def next_log_p(ids):
  tokens = np.zeros((1, MAX_LEN), np.int32)
  tokens[0, :len(ids)] = ids
  return np.asarray(plain_forward()(Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape))))[
      0, len(ids) - 1]


def test_the_number_of_programs_does_not_grow_with_the_requests():
  with jax.set_mesh(mesh := mesh_of(1)):
    scorer = Scorer(loaded(), mesh)
    scorer.score(random_pairs(1, 40))
    before = lm_scores.score_rows._cache_size()
    scorer.score(random_pairs(2, 70))
    assert lm_scores.score_rows._cache_size() == before


def test_a_continuation_longer_than_the_context_is_scored_in_windows():
  after = np.random.default_rng(3).integers(0, 256, 3 * MAX_LEN + 5).tolist()
  with jax.set_mesh(mesh := mesh_of(1)):
    [score] = Scorer(loaded(), mesh).score([([BOS, 7], after)])
  parts = list(rolling_windows(after, 7, MAX_LEN))
  assert score.log_p == pytest.approx(sum(plain_score(*part)[0] for part in parts), abs=1e-3)


@property_test
@given(st.integers(0, 200), st.integers(1, 17))
def test_rolling_windows_have_each_token_once_with_full_context_at_the_end(count, length):
  ids = list(range(1, count + 1))
  pairs = list(rolling_windows(ids, 0, length))
  assert [token for _, after in pairs for token in after] == ids
  for before, after in pairs:
    assert before and len(before) + len(after) - 1 <= length
    assert before == list(range(after[0] - len(before), after[0]))
  if count > length:
    assert len(pairs[-1][0]) + len(pairs[-1][1]) - 1 == length


@property_test
@given(st.integers(1, 200), st.integers(1, 17))
def test_rolling_windows_are_those_of_lm_eval(count, length):
  utils = pytest.importorskip('lm_eval.utils')
  ids = list(range(1, count + 1))
  theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(
      token_list=ids, prefix_token=0, max_seq_len=length, context_len=1))
  assert [tuple(map(list, pair)) for pair in theirs] == list(rolling_windows(ids, 0, length))


def pieces(text):
  """A toy tokenizer: pairs of letters, such that a token may span two texts."""
  return [int.from_bytes(text[i:i + 2].encode(), 'big') for i in range(0, len(text), 2)]


def test_a_pair_is_encoded_whole_and_cut_at_the_context():
  assert split_pair(list, 'ab', 'cd') == (['a', 'b'], ['c', 'd'])
  assert split_pair(list, 'ab  \n', 'cd') == (['a', 'b'], [' ', ' ', '\n', 'c', 'd'])
  assert split_pair(list, '', 'cd') == ([], ['c', 'd']) and split_pair(list, 'ab', '') == (['a'], ['b'])
  before, after = split_pair(pieces, 'abc', 'd')  # 'cd' is one token, which the continuation gets
  assert before == pieces('ab') and after == pieces('cd')
  # 'cd' spans the texts, and another token follows: the context has its own ids, as by lm_eval's models.
  assert split_pair(pieces, 'abc', 'def') == (pieces('abc'), pieces('ef'))
  assert split_pair(list, '', '') == ([], [])


def test_generation_ends_at_a_stop_string_and_does_not_depend_on_the_batch(monkeypatch):
  prompts = [[BOS, *f'prompt {i} {"x" * i}'.encode()] for i in range(9)]
  with jax.set_mesh(mesh := mesh_of(1)):
    scorer = Scorer(loaded(), mesh)
    whole = scorer.generate(prompts, Decoding(num_tokens=20))
    stop = whole[3][5]
    cut = scorer.generate(prompts, Decoding(until=(stop, 'never'), num_tokens=20))
    assert cut == [text.partition(stop)[0] for text in whole]
    assert [scorer.generate([prompt], Decoding(num_tokens=20))[0] for prompt in prompts[:3]] == whole[:3]
    long = scorer.generate([[BOS] + [65] * 100], Decoding(num_tokens=1000))
    assert long == scorer.generate([[65] * (MAX_LEN // 2)], Decoding(num_tokens=MAX_LEN // 2))
    hot = [scorer.generate(prompts[:2], Decoding(num_tokens=8, temperature=50.0), seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def test_a_missing_package_is_one_message(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
  words = r"the package lm_eval is not installed; run pip install 'llm_jax\[lm-eval\]'"
  with pytest.raises(ConfigError, match=f'--tasks: {words}'):
    lm_harness.load_package('--tasks')
  config = llm_jax.load_config(write_config(tmp_path), **{'log.callbacks': ('lm_eval',),
                                                          'log.lm_eval.tasks': ('arc_easy',)})
  with pytest.raises(ConfigError, match=f'config.log.lm_eval.tasks: {words}'):
    list(llm_jax.train(config, tmp_path / 'run'))


@pytest.mark.parametrize(('given_flags', 'words'), [
    (['--tasks=arc_easy', '--data=x.txt'], '--tasks: has data of its own; leave out --data'),
    (['--limit=3'], '--limit: has an effect only with --tasks'),
    (['--tasks=arc_easy', '--limit=0'], '--limit must be at least 1'),
    (['--tasks=arc_easy', '--harness=lm_evil'], "'lm_evil' is not known here.*lm_eval")])
def test_flags_that_cannot_be_together_are_refused(given_flags, words, tmp_path):
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ConfigError, match=words):
    evaluate.main([f'--workdir={tmp_path}', *given_flags])


# With the package.

TASK = '''task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: {kind}
test_split: test
metric_list: [{metrics}]
{rest}
'''


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A folder with three tasks whose data are files."""
  folder = tmp_path_factory.mktemp('tasks')
  documents = {'pick': [{'question': f'def f{i}(self, ', 'choices': ['x', 'config: Config)', 'zz qq'], 'answer': 1}
                        for i in range(12)],
               'write': [{'question': f'def f{i}(', 'answer': 'self'} for i in range(4)],
               'roll': [{'text': 'def f(self) -> None:\n' * i} for i in (1, 5, 20)]}
  kinds = {
      'pick': ('multiple_choice', '{metric: acc}, {metric: acc_norm}',
               'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"'),
      'write': ('generate_until', '{metric: exact_match}', 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
                'generation_kwargs: {until: ["("], max_gen_toks: 8}'),
      'roll': ('loglikelihood_rolling', '{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}',
               'doc_to_text: ""\ndoc_to_target: "{{text}}"')}
  for name, (kind, metrics, rest) in kinds.items():
    path = folder / f'{name}.jsonl'
    path.write_text('\n'.join(map(json.dumps, documents[name])))
    (folder / f'{name}.yaml').write_text(TASK.format(name=name, path=path, kind=kind, metrics=metrics, rest=rest))
  return folder, documents


def test_tasks_of_ones_own_run_without_a_network_at_the_end_and_while_training(tasks, tmp_path, monkeypatch, capsys):
  pytest.importorskip('lm_eval')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'hf'))
  folder, documents = tasks
  config = llm_jax.load_config(write_config(tmp_path), **{
      'num_steps': 20, 'eval.every': 0, 'log.callbacks': ('lm_eval',), 'log.lm_eval.include_path': str(folder),
      'log.lm_eval.tasks': ('local_pick', 'local_roll'), 'log.lm_eval.every': 10, 'log.lm_eval.limit': 6})
  list(llm_jax.train(config, tmp_path / 'run'))
  logged = [line for line in read_metrics(tmp_path / 'run' / 'metrics.jsonl') if 'tasks/local_pick/acc' in line]
  assert [line['step'] for line in logged] == [10, 20]
  assert 0 < logged[1]['tasks/local_roll/byte_perplexity'] < logged[0]['tasks/local_roll/byte_perplexity']
  capsys.readouterr()

  evaluate.main([f'--workdir={tmp_path / "run"}', f'--include_path={folder}',
                 '--tasks=local_pick,local_write,local_roll'])
  shown, report = capsys.readouterr().out, json.loads((tmp_path / 'run' / 'evaluation_tasks.json').read_text())
  assert 'local_write' in shown and report['documents'] == {'local_pick': 12, 'local_write': 4, 'local_roll': 3}

  trained = llm_jax.load(tmp_path / 'run')
  with jax.set_mesh(mesh := make_mesh(MeshConfig())):
    scorer = Scorer(trained.run, mesh)
    scores = [[scorer.score([scorer.pair(d['question'], f' {c}')])[0].log_p for c in d['choices']]
              for d in documents['pick']]
    total = sum(scorer.score(scorer.windows(d['text']))[0].log_p for d in documents['roll'][:1])
    total += sum(s.log_p for d in documents['roll'][1:] for s in scorer.score(scorer.windows(d['text'])))
  results, size = report['results'], sum(len(d['text'].encode()) for d in documents['roll'])
  assert results['local_pick']['acc'] == np.mean([np.argmax(row) == 1 for row in scores])
  assert results['local_roll']['bits_per_byte'] == pytest.approx(-total / size / np.log(2), rel=1e-4)

  with pytest.raises(ConfigError, match=r"lm_eval has no task 'local_pik'; did you mean local_pick\?"):
    evaluate.main([f'--workdir={tmp_path / "run"}', f'--include_path={folder}', '--tasks=local_pik'])
  (folder / 'roll.jsonl').unlink()
  with pytest.raises(DataError, match=r'lm_eval cannot run local_roll: .*include_path'):
    evaluate.main([f'--workdir={tmp_path / "run"}', f'--include_path={folder}', '--tasks=local_roll'])


def test_generation_options_of_tasks_are_read():
  pytest.importorskip('lm_eval')
  from llm_jax.extras.lm_harness_model import decoding_of
  assert decoding_of({'until': '\n'}) == Decoding(('\n',), 256)
  assert decoding_of({'until': ['a', 'b'], 'max_tokens': 9, 'temperature': 0.7, 'do_sample': False}) == Decoding(
      ('a', 'b'), 9)
  assert decoding_of({'do_sample': True, 'temperature': 0.7, 'top_k': 3, 'top_p': 0.9}) == Decoding(
      (), 256, 0.7, 3, 0.9)
  assert decoding_of({'temperature': 0.5}).temperature == 0.5 and decoding_of({'do_sample': True}).temperature == 1.0


def test_the_adapter_is_registered():
  registry = pytest.importorskip('lm_eval.api.registry')
  from llm_jax.extras.lm_harness_model import RunModel
  assert registry.get_model('llm_jax') is RunModel

"""Runs that learn labels of whole documents: trained, stopped, evaluated and used for predictions."""

import contextlib
import functools
import io
import json
import random
import signal

import matplotlib.image
import numpy as np
import pytest
from program import finish, signal_at, start

from llm_jax import main
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.commands import evaluate, generate
from llm_jax.extras.commands import predict
from llm_jax.training.log import read_metrics

CONFIG = '''"""Which letter is repeated, and how often?"""
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 60
  config.batch_tokens = config.tokens_per_device = 16 * 12
  config.model.num_layers = 1
  config.model.embed_dim = 16
  config.model.num_heads = 2
  config.data.path = {path!r}
  config.data.field = 'text'
  config.data.label_field = {label!r}
  config.data.answer_field = {answer!r}
  config.data.split = 'document'
  config.data.val_fraction = 0.2
  config.data.tokenizer = 'byte'
  config.data.task = {task!r}
  config.data.packing = 'pad'
  config.data.seq_len = config.data.encoder_len = 12
  config.loss.terms = ({term!r},)
  config.optim.learning_rate = 1e-2
  config.eval.every = 20
  config.checkpoint.every = 20
  config.log.every = 1
  return config
'''
TAUGHT = ('--config.loss.terms=next_token,distillation', '--config.data.task=next_token')
KINDS = {'classification': ('kind', None, 'classification', 'classification'),
         'regression': ('length', None, 'regression', 'regression'),
         'contrastive': (None, 'same', 'pairs', 'contrastive')}


def records(seed):
  rng = random.Random(seed)
  for _ in range(80):
    letter, count, other = rng.choice('xyz'), rng.randint(2, 8), rng.choice('abc')
    yield {'text': letter * count + other, 'kind': f'all {letter}', 'length': float(count), 'same': other + letter * 2}


def write(path, seed=0, only='xyz'):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records(seed) if r['text'][0] in only))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('labels')
  write(folder / 'data.jsonl')
  for name, (label, answer, task, term) in KINDS.items():
    path = str(folder / 'data.jsonl')
    (folder / f'{name}.py').write_text(CONFIG.format(path=path, label=label, answer=answer, task=task, term=term))
  return folder


@pytest.fixture(scope='module')
def run(folder):
  """run(kind): trains it once; returns the printed output."""
  def trained(name):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      main.main([f'--config={folder}/{name}.py', f'--workdir={folder}/{name}'])
    return printed.getvalue()

  return functools.cache(trained)


def report_of(capsys):
  printed = capsys.readouterr().out
  return json.loads(printed[printed.index('{'):])


def told(capsys, *flags):
  predict.main(list(flags))
  lines = capsys.readouterr().out.splitlines()
  return [json.loads(line) for line in lines if line.startswith('{')]


@pytest.mark.slow
def test_a_classifier_is_evaluated_with_confusion_counts(folder, run, capsys, tmp_path):
  output = run('classification')
  evaluate.main([f'--workdir={folder}/classification', f'--out={tmp_path}/result.json'])
  printed, written = report_of(capsys), json.loads((tmp_path / 'result.json').read_text())
  assert printed['accuracy'] > 0.95 and printed['macro_f1'] > 0.95 and 'val/macro_f1' in output
  counts = np.array(written['confusion'])
  assert written['classes'] == ['all x', 'all y', 'all z'] and counts.shape == (3, 3)
  assert counts.sum() == written['documents'] and np.trace(counts) == round(written['accuracy'] * counts.sum())
  assert min(matplotlib.image.imread(tmp_path / 'confusion.png').shape[:2]) > 100
  last = read_metrics(folder / 'classification' / 'metrics.jsonl')[-1]
  assert last['val/accuracy'] == pytest.approx(written['accuracy'])


def test_labels_of_other_data_are_matched_by_name(folder, run, capsys, tmp_path):
  """The other file has only two of the classes, which would be numbers 0 and 1 on their own."""
  run('classification')
  write(tmp_path / 'other.jsonl', seed=1, only='yz')
  evaluate.main([f'--workdir={folder}/classification', f'--data={tmp_path}/other.jsonl', f'--out={tmp_path}/r.json'])
  assert report_of(capsys)['accuracy'] > 0.95
  (tmp_path / 'odd.jsonl').write_text(json.dumps({'text': 'qq', 'kind': 'all q'}) + '\n')
  with pytest.raises(DataError, match=r'labels all q are not classes.*all x, all y, all z'):
    evaluate.main([f'--workdir={folder}/classification', f'--data={tmp_path}/odd.jsonl'])


def test_texts_are_classified(folder, run, capsys):
  run('classification')
  first, second = told(capsys, f'--workdir={folder}/classification', '--text=yyyya', '--text=zzc', '--top=2')
  assert [next(iter(x['classification'])) for x in (first, second)] == ['all y', 'all z']
  assert len(first['classification']) == 2 and first['text'] == 'yyyya'


@pytest.mark.slow
def test_numbers_are_predicted_in_their_own_units(folder, run, capsys, monkeypatch):
  run('regression')
  assert read_metrics(folder / 'regression' / 'metrics.jsonl')[-1]['val/r2'] > 0.7
  monkeypatch.setattr('sys.stdin', ['xxxxxxxxa\n', 'xxa\n'])
  [eight], [two] = (x['regression'] for x in told(capsys, f'--workdir={folder}/regression'))
  assert eight > two + 2


@pytest.mark.slow
def test_pairs_are_embedded(folder, run, capsys, tmp_path):
  run('contrastive')
  assert read_metrics(folder / 'contrastive' / 'metrics.jsonl')[-1]['val/top5_accuracy'] > 0.5
  evaluate.main([f'--workdir={folder}/contrastive', f'--out={tmp_path}/r.json'])
  assert {'accuracy', 'mrr', 'loss'} <= report_of(capsys).keys()
  assert not (tmp_path / 'answers.jsonl').exists()
  embeddings = np.array([x['contrastive'] for x in told(
      capsys, f'--workdir={folder}/contrastive', '--text=yyyya', '--text=ayy', '--text=cxx')])
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
  assert embeddings[0] @ embeddings[1] > embeddings[0] @ embeddings[2]


@pytest.mark.slow
def test_a_stopped_classifier_resumes_bitwise(folder):
  """Labels of batches, the head and its optimizer state equal those of an uninterrupted run."""
  finish(start(folder, 'main', '--config=classification.py', '--workdir=uninterrupted'))
  flags = ('--config=classification.py', '--workdir=stopped')
  process = start(folder, 'main', *flags)
  signal_at(process, folder / 'stopped', 10, signal.SIGTERM)
  finish(process, 75)
  finish(start(folder, 'main', *flags))
  whole, stopped = (read_metrics(folder / name / 'metrics.jsonl')[-1] for name in ('uninterrupted', 'stopped'))
  timed = ('goodput/', 'system/', 'train/tokens_per_', 'train/seconds_per_', 'train/data_wait')
  learnt, again = ({k: v for k, v in line.items() if not k.startswith(timed)} for line in (whole, stopped))
  assert learnt == again
  assert {'train/loss', 'train/grad_norm', 'val/loss'} <= learnt.keys()


def test_generate_rejects_a_classifier(folder, run):
  run('classification')
  with pytest.raises(ConfigError, match=r'was not trained to generate text.*llm-jax predict'):
    generate.main([f'--workdir={folder}/classification'])


@pytest.mark.parametrize(('flags', 'words'), [
    (('--config.loss.terms=next_token',), ['provides labels', 'loss.terms=next_token']),
    (('--config.data.task=next_token',), ['loss.terms classification needs data.task classification']),
    (('--config.data.task=regression',), ['loss.terms classification needs data.task classification']),
    (('--config.loss.terms=next_token', '--config.data.task=masked_tokens', '--config.data.label_field=none'),
     ['model.prefix_attention', 'masked_tokens']),
    (('--config.eval.answers=3',), ['eval.answers', 'needs a tokenizer and a task with answers']),
    (('--config.loss.classification.num_classes=2',), ['loss.classification.num_classes: 2', '3 classes of the data']),
    ((*TAUGHT, '--config.loss.distillation.teacher=nowhere'),
     ['loss.distillation.teacher', 'nowhere', 'does not exist']),
    ((*TAUGHT, '--config.loss.distillation.teacher=classification', '--config.model.vocab_size=300'),
     ['loss.distillation.teacher', 'another tokenizer or vocabulary', '257']),
])
def test_conflicting_settings_are_reported(folder, run, tmp_path, monkeypatch, flags, words):
  run('classification')
  monkeypatch.chdir(folder)
  with pytest.raises(ConfigError) as e:
    main.main(['--config=classification.py', f'--workdir={tmp_path}/run', *flags])
  assert all(word in str(e.value) for word in words), e.value


def test_contrastive_rejects_an_encoder_decoder(folder, tmp_path):
  """An encoder-decoder would already have read the partner."""
  text = (folder / 'contrastive.py').read_text().replace('config = base()', "config = base('encdec')")
  (tmp_path / 'both.py').write_text(text)
  with pytest.raises(ConfigError, match=r'encdec reads both texts.*set decoder or byte_patch'):
    main.main([f'--config={tmp_path}/both.py', f'--workdir={tmp_path}/run'])


def test_a_class_missing_in_training_is_reported(folder, tmp_path):
  """Otherwise the loss would be NaN, or a document would be missing in the confusion counts."""
  for name, label in (('train', 0), ('train', 1), ('val', 2)):
    with open(tmp_path / f'{name}.jsonl', 'a') as f:
      f.writelines(json.dumps({'text': f'{label}{i}', 'kind': label}) + '\n' for i in range(16))
  with pytest.raises(DataError, match=r'val part has class 2.*0 to 1.*num_classes to 3'):
    main.main([f'--config={folder}/classification.py', f'--workdir={tmp_path}/run',
               f'--config.data.path={tmp_path}/train.jsonl', f'--config.data.val_path={tmp_path}/val.jsonl'])


def test_contrastive_rejects_microbatches(folder, tmp_path):
  """16 rows of 12 tokens on 8 devices."""
  with pytest.raises(ConfigError, match=r'tokens_per_device: 12 splits .* into 2 .*terms=contrastive.*at once; set 24'):
    main.main([f'--config={folder}/contrastive.py', f'--workdir={tmp_path}/run', '--config.tokens_per_device=12'])


def test_another_loss_in_the_same_workdir_is_rejected(folder, run):
  run('classification')
  with pytest.raises(ConfigError, match=r"config\.loss\.terms: checkpoint \['classification'\], now .*next_token"):
    main.main([f'--config={folder}/classification.py', f'--workdir={folder}/classification',
               '--config.loss.terms=classification,next_token'])

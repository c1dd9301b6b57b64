"""What TensorBoard gets: tags in order, descriptions, no repeated constants, hyperparameters, text that wraps."""

import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import metadata

from llm_jax.base.describe import DESCRIPTIONS, describe_metric
from llm_jax.base.loggers import Histogram, LoggedRun
from llm_jax.base.tensorboard import TensorBoard, hyperparameters, quoted, tag_of


def read(workdir):
  accumulator = event_accumulator.EventAccumulator(str(workdir), size_guidance={'scalars': 0, 'histograms': 0})
  accumulator.Reload()
  return accumulator


def test_losses_come_first_and_side_groups_last():
  names = ['train/loss', 'val/loss', 'best/val/loss', 'val/stdlib/loss', 'train/grad_norm', 'val/accuracy',
           'capability/val/loss < 2', 'epoch/loss', 'goodput/step', 'system/host_cpu', 'update_ratio/head/w']
  assert sorted(map(tag_of, reversed(names))) == list(map(tag_of, names))
  assert [tag_of(name) for name in names[:4]] == ['loss/train', 'loss/val', 'loss/val/best', 'loss/val/stdlib']


def test_every_tag_has_a_description_and_scalars_are_listed(tmp_path):
  logger = TensorBoard(LoggedRun(tmp_path, 0, {}))
  names = ['train/loss', 'val/loss', 'train/mfu', 'val/my_metric', 'goodput/step', 'unknown']
  for step in (1, 2):
    logger.scalars(step, {name: float(step) for name in names})
  logger.text(2, 'sample/def ', 'def f')
  logger.close()
  accumulator = read(tmp_path)
  assert sorted(accumulator.Tags()['scalars']) == sorted(map(tag_of, names))
  for name in names:
    found = accumulator.SummaryMetadata(tag_of(name))
    assert found.summary_description == describe_metric(name) != '' and found.plugin_data.plugin_name == 'scalars'
  assert 'after this prompt: def ' in accumulator.SummaryMetadata('sample/def ').summary_description


def test_descriptions_are_found_in_order():
  assert describe_metric('train/loss').startswith('The loss of the training batch')
  assert describe_metric('val/code/loss') == 'The loss of the validation part.'
  assert describe_metric('goodput/save').endswith('spent on: save.') and describe_metric('foo') == 'foo'
  assert len({pattern for pattern, _ in DESCRIPTIONS}) == len(DESCRIPTIONS)


def test_equal_values_in_a_row_are_written_once_at_each_end(tmp_path):
  logger = TensorBoard(LoggedRun(tmp_path, 0, {}))
  for step, value in enumerate([5.0, 5.0, 5.0, 5.0, 6.0, 7.0, 7.0, 7.0], start=1):
    logger.scalars(step, {'train/num_tokens': value})
  logger.close()
  points = [(event.step, event.value) for event in read(tmp_path).Scalars('train/num_tokens')]
  assert points == [(1, 5), (4, 5), (5, 6), (6, 7), (8, 7)]


def test_a_run_has_hyperparameters(tmp_path):
  config = {'num_steps': 10, 'optim': {'learning_rate': 1e-3, 'chain': ('adamw',)}, 'flag': True, 'limit': None}
  TensorBoard(LoggedRun(tmp_path, 0, config)).close()
  content = read(tmp_path).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
  info = metadata.parse_session_start_info_plugin_data(content)
  assert info.hparams['optim.learning_rate'].number_value == 1e-3 and info.hparams['flag'].bool_value
  assert hyperparameters(config) == {'num_steps': 10, 'optim.learning_rate': 1e-3, 'optim.chain': '["adamw"]',
                                     'flag': True, 'limit': 'null'}


def test_histograms_are_read_as_they_were_written(tmp_path):
  logger = TensorBoard(LoggedRun(tmp_path, 0, {}))
  values = np.linspace(-1.0, 2.0, 31)
  counts, edges = np.histogram(values, 6)
  logger.histograms(3, {'weights/head/w': Histogram(-1.0, 2.0, counts, values.sum(), (values**2).sum())})
  logger.close()
  [event] = read(tmp_path).Histograms('x_weights/head/w')
  found = event.histogram_value
  assert event.step == 3 and found.num == 31 and (found.min, found.max) == (-1, 2)
  np.testing.assert_allclose(found.bucket_limit, edges[1:])
  np.testing.assert_allclose(found.bucket, counts)


@pytest.mark.parametrize('text', ['a *b* _c_ <b>d</b> # e\n- f\n\n1. g', '  def f():\n    return x[0] # `a`', ''])
def test_a_sample_is_shown_as_it_is(text):
  """Markdown gives back the text, its lines and indentation, and no markup of its own."""
  markdown = pytest.importorskip('markdown')  # which TensorBoard depends on
  import html
  import re
  shown = markdown.markdown(quoted(text), extensions=['tables', 'fenced_code'])
  assert not re.search('<(?!/?(blockquote|p|br ?/?)>)', shown), shown
  plain = html.unescape(re.sub('<br ?/?>', '', re.sub('</?(blockquote|p)>\n?', '', shown))).replace('\xa0', ' ')
  assert [line.rstrip() for line in plain.strip('\n').split('\n')] == (text.split('\n') if text else [''])


def test_tensorboard_is_not_imported_before_the_first_entry(tmp_path):
  program = f'''
import sys
from pathlib import Path
import llm_jax.training.loop
from llm_jax.base.loggers import LoggedRun
from llm_jax.config import LogConfig
from llm_jax.training.log import MetricsWriter
writer = MetricsWriter(LoggedRun(Path({str(tmp_path)!r}), 0, {{}}), LogConfig())
assert 'tensorboard' not in sys.modules
writer.scalars(1, {{'train/loss': 1.0}})
assert 'tensorboard' in sys.modules
'''
  subprocess.run([sys.executable, '-c', program], check=True)

"""TensorBoard event files, written without TensorFlow: scalars, samples, histograms and hyperparameters."""

from __future__ import annotations

import html
import json
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_jax.base.describe import describe_metric
from llm_jax.base.loggers import Histogram, LoggedRun, Logger

if TYPE_CHECKING:
  from tensorboard.summary.writer.event_file_writer import EventFileWriter

MAIN = ('loss', 'train', 'val')  # groups of tags; all others sort behind them


class TensorBoard(Logger):
  """Writes an event file in the run's folder.

  Its packages take a third of a second to import, so that is done with the first entry, which comes after the first
  step, or when the logger is closed.
  """

  def __init__(self, run: LoggedRun):
    self._run = run
    self._events: EventFileWriter | None = None
    self._described = set[str]()
    self._last: dict[str, tuple[int, float, bool]] = {}  # by tag: step and value of the newest, whether it is written

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the points of a curve. Of equal values in a row it writes the first and the last: the same curve."""
    for name, value in values.items():
      tag = tag_of(name)
      before = self._last.get(tag)
      if before is not None and value == before[1]:
        self._last[tag] = step, value, False
        continue
      if before is not None and not before[2]:
        self._scalar(tag, name, *before[:2])
      self._scalar(tag, name, step, value)
      self._last[tag] = step, value, True

  def text(self, step: int, name: str, value: str) -> None:
    """Writes a text as Markdown that wraps, below a heading with step and name."""
    group, _, prompt = name.partition('/')
    heading = f'**step {step}**, {group}' + (f': {escape_markdown(prompt)}' if prompt else '')
    self._markdown(step, name, f'{heading}\n\n{quoted(value)}')

  def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto
    for name, h in values.items():
      proto = HistogramProto(min=h.low, max=h.high, num=float(h.counts.sum()), sum=h.total, sum_squares=h.squares,
                             bucket_limit=h.edges[1:].tolist(), bucket=h.counts.tolist())
      self._value(step, tag=tag_of(name), histo=proto, metadata=self._metadata(tag_of(name), name, 'histograms'))

  def close(self) -> None:
    for tag, (step, value, written) in self._last.items():
      if not written:
        self._scalar(tag, tag, step, value)
    self._writer.close()

  @property
  def _writer(self) -> EventFileWriter:
    if self._events is None:
      from tensorboard.compat.proto.event_pb2 import Event, SessionLog
      from tensorboard.plugins.hparams.summary_v2 import hparams_pb
      from tensorboard.summary.writer.event_file_writer import EventFileWriter
      threading.excepthook = _report_thread
      run, folder = self._run, self._run.workdir.absolute()
      self._events = EventFileWriter(str(run.workdir), flush_secs=10)
      # Makes TensorBoard drop what an interrupted run wrote after this step.
      self._events.add_event(Event(wall_time=time.time(), step=run.step + 1,
                                   session_log=SessionLog(status=SessionLog.START)))
      values = hyperparameters(run.config)
      self._events.add_event(Event(wall_time=time.time(), step=run.step, summary=hparams_pb(
          values, trial_id=f'{folder.name} in {folder.parent}')))
      if run.step == 0:
        self._markdown(0, tag_of('config'), f'```json\n{json.dumps(run.config, indent=2)}\n```')
    return self._events

  def _scalar(self, tag: str, name: str, step: int, value: float) -> None:
    # A simple value: TensorBoard's EventAccumulator neither lists tensors as scalars nor drops them after a restart.
    self._value(step, tag=tag, simple_value=value, metadata=self._metadata(tag, name, 'scalars'))

  def _markdown(self, step: int, name: str, value: str) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.text.summary_v2 import text_pb
    self._writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(
        name, value, description=describe_metric(name.removeprefix('x_')))))

  def _value(self, step: int, **fields: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(**fields)])))

  def _metadata(self, tag: str, name: str, plugin: str) -> Any:
    """The description of a tag with its first value, else None."""
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
    if tag in self._described:
      return None
    self._described.add(tag)
    return SummaryMetadata(summary_description=describe_metric(name),
                           plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))


def _report_thread(args: Any, report: Any = threading.excepthook) -> None:
  """Leaves out the traceback of the thread that writes events on a full disk: the next event raises the same error."""
  if not (type(args.thread).__name__ == '_AsyncWriterThread' and isinstance(args.exc_value, OSError)):
    report(args)


def tag_of(name: str) -> str:
  """The tag of a metric, so that losses come first and side groups last, as TensorBoard sorts groups by name.

  'train/loss' is 'loss/train', 'best/val/loss' is 'loss/val/best', 'goodput/step' is 'x_goodput/step'.
  """
  group, *rest = name.split('/')
  if group == 'best':
    return tag_of('/'.join(rest)) + '/best'
  if group in MAIN and rest and rest[-1] == 'loss':
    return '/'.join(['loss', group, *rest[:-1]])
  return name if group in MAIN else f'x_{name}'


def hyperparameters(config: Mapping[str, Any], path: str = '') -> dict[str, bool | float | str]:
  """The leaves of a config by path; TensorBoard puts those that differ between runs first."""
  found: dict[str, bool | float | str] = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      found |= hyperparameters(value, f'{path}{name}.')
    else:
      found[f'{path}{name}'] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
  return found


def escape_markdown(text: str) -> str:
  """The text as Markdown that shows it as it is."""
  return re.sub(r'([\\`*_{}\[\]()#+\-.!])', r'\\\1', html.escape(text, quote=False)).replace('|', '&#124;')


def quoted(text: str) -> str:
  """A plain text as a Markdown quotation with the same lines, which wrap."""
  lines = []
  for line in text.expandtabs(4).splitlines() or ['']:
    indent = len(line) - len(line.lstrip(' '))
    lines.append('> ' + '&nbsp;' * indent + (escape_markdown(line[indent:]) or '&nbsp;') + '  ')
  return '\n'.join(lines)

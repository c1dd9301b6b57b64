"""More loggers: metrics.csv, and Weights & Biases (pip install 'llm_jax[wandb]')."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import ConfigError
from llm_jax.base.files import check_no_link, open_append, write_file
from llm_jax.base.loggers import LOGGERS, Histogram, LoggedRun, Logger
from llm_jax.base.registry import register


class Csv(Logger):
  """metrics.csv: one row for each logged step and one column for each metric, empty where a step has no value."""

  def __init__(self, run: LoggedRun):
    self._path = run.workdir / 'metrics.csv'
    text = self._path.read_text(errors='replace') if self._path.exists() else ''
    rows = list(csv.DictReader(io.StringIO(text[:text.rfind('\n') + 1])))  # a killed process may leave part of a row
    rows = rows if rows and 'step' in rows[0] else []  # else the header is damaged
    self._names = list(rows[0]) if rows else ['step']
    self._rows: list[dict[str, Any]] = [
        row for row in rows if (row['step'] or '').isdigit() and int(row['step']) <= run.step]
    self._rewrite()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    row = {'step': step, **values}
    new = [name for name in row if name not in self._names]
    if new or (self._rows and int(self._rows[-1]['step']) == step):
      if self._rows and int(self._rows[-1]['step']) == step:
        row = self._rows.pop() | row
      self._names += new
      self._rows.append(row)
      self._rewrite()
    else:
      self._rows.append(row)
      self._write([row], self._file)
      self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _rewrite(self) -> None:
    text = io.StringIO()
    csv.DictWriter(text, self._names, lineterminator='\n').writeheader()
    self._write(self._rows, text)
    write_file(self._path, text.getvalue())
    self._file = open_append(self._path)

  def _write(self, rows: list[dict[str, Any]], file: Any) -> None:
    csv.DictWriter(file, self._names, lineterminator='\n').writerows(rows)


class Wandb(Logger):
  """A run of Weights & Biases, which a resumed run goes on with: its id is kept in the run's folder.

  W&B cannot remove what was logged after the step that a run resumes from; `step` is the horizontal axis, so these
  points are drawn twice. WANDB_MODE=offline writes to WORKDIR/wandb, for `wandb sync`.
  """

  def __init__(self, run: LoggedRun, project: str = 'llm_jax', entity: str = '', group: str = '',
               tags: tuple[str, ...] = ()):
    import wandb
    path = run.workdir / 'wandb_id'
    check_no_link(run.workdir / 'wandb')
    known = path.read_text().strip() if path.exists() else None
    try:
      self._run = wandb.init(project=project, entity=entity or None, group=group or None, tags=tags or None,
                             name=run.workdir.absolute().name, id=known, resume='allow', dir=str(run.workdir),
                             config=run.config, settings=wandb.Settings(
                                 console='off', silent=True, x_disable_meta=True))  # the command, with its secrets
    except (wandb.errors.UsageError, wandb.errors.CommError) as e:
      raise ConfigError(f'config.log.loggers: W&B could not start ({e}); log in with `wandb login`, set '
                        'WANDB_MODE=offline, or take wandb out of the list') from None
    write_file(path, self._run.id + '\n')
    self._run.define_metric('*', step_metric='step')

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._log({'step': step, **values})

  def text(self, step: int, name: str, value: str) -> None:
    import wandb
    self._log({'step': step, name: wandb.Html(f'<p>step {step}</p><pre style="white-space: pre-wrap">'
                                                  f'{html.escape(value)}</pre>', inject=False)})

  def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
    import wandb
    self._log({'step': step} | {name: wandb.Histogram(np_histogram=(h.counts, h.edges))
                                    for name, h in values.items()})

  def close(self) -> None:
    self._run.finish()

  def _log(self, values: Mapping[str, Any]) -> None:
    import wandb
    try:
      self._run.log(values)
    except wandb.errors.Error as e:
      raise OSError(str(e)) from None


register(LOGGERS, 'csv', Csv)
register(LOGGERS, 'wandb', Wandb)

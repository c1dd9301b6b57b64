"""Traces a few steps with JAX's profiler, for TensorBoard and Perfetto."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from llm_jax.base.files import check_no_link

HOW = '''the trace from step {first} on is in {folder}
  TensorBoard: pip install xprof, then tensorboard --logdir {workdir}, page PROFILE
  Perfetto: drop {trace} on https://ui.perfetto.dev'''


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Which steps to trace into the workdir. Traced steps are slower."""

  start: int = 0  # the first traced step, counted from 1; 0: no trace
  num_steps: int = 3  # number of traced steps, at least 1

  def __post_init__(self) -> None:
    if self.start < 0 or self.num_steps < 1:
      raise ValueError(f'start must not be negative and num_steps at least 1; got {self.start}, {self.num_steps}')


class Profiler:
  """Traces whole steps on process 0. A context manager: leaving it ends a trace that a signal interrupted."""

  def __init__(self, config: ProfileConfig, workdir: Path, begin: int, say: Callable[[str], None]):
    self._before = config.start - 1
    self._last = self._before + config.num_steps if config.start else -1  # no step is -1
    self._workdir, self._say = workdir, say
    self._tracing = False
    if 0 <= self._before < begin:
      say(f'WARNING: no trace: config.profile.start is {config.start}, but this run begins after step {begin}')

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *exc: object) -> None:
    self._end()

  def due(self, step: int) -> bool:
    """Whether this step must finish before the next one is dispatched, so that only whole steps are traced."""
    return step in (self._before, self._last)

  def begin_after(self, step: int) -> None:
    if step == self._before and jax.process_index() == 0:
      for folder in ('profile', 'profile/plugins', 'profile/plugins/profile'):
        check_no_link(self._workdir / folder)
      jax.profiler.start_trace(self._workdir / 'profile', create_perfetto_trace=True)
      self._tracing = True

  def end_after(self, step: int) -> None:
    if step == self._last:
      self._end()

  def _end(self) -> None:
    if self._tracing:
      self._tracing = False
      try:  # a trace that cannot be written does not end the run
        jax.profiler.stop_trace()
        [*_, trace] = sorted((self._workdir / 'profile').glob('plugins/profile/*/perfetto_trace.json.gz'))
      except (OSError, RuntimeError, ValueError) as e:
        self._say(f'WARNING: no trace was written to {self._workdir / "profile"}: {e}')
        return
      self._say(HOW.format(first=self._before + 1, folder=trace.parent, trace=trace, workdir=self._workdir))

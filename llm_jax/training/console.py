"""What process 0 prints of a training: in a terminal lines above one live line, elsewhere plain lines."""

from __future__ import annotations

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.progress import LINE, Progress, duration
from llm_jax.base.terminal import columns, wrap
from llm_jax.config import LogConfig

SAMPLE_LINES, SAMPLE_CHARACTERS = 4, 400
LINES_KEPT = 20  # lines of metrics that a terminal keeps of a run, besides those of evaluated steps


class Console:
  """The console output of one session."""

  def __init__(self, num_steps: int, step: int, config: LogConfig):
    self._enabled = jax.process_index() == 0
    self._num_steps = num_steps
    self._training = Progress('training', num_steps, initial=step, shown=self._enabled)
    self._training.note = f'{step:,}/{num_steps:,}'
    self._values = ''
    self._points, self._unprinted = -1, ''  # the share of the run that was printed, in LINES_KEPT; the newest metrics
    self._first: Progress | None = None  # compiling the first step
    self._samples = config.samples == 'always' or (config.samples == 'auto' and LINE.live)

  def begin(self) -> None:
    """Announces the first step, whose program is compiled."""
    if not LINE.live:
      self.line('compiling the training step')
    self._first = self.progress('compiling the training step')
    ACTIVITY.enter('compile')

  def started(self, seconds: float) -> None:
    if self._first is not None:
      self._first.close()
    self.line(f'first step after {seconds:.1f} s of compiling and running')

  def step(self, step: int) -> None:
    """Moves the live line to a step that is done."""
    self._training.n = step
    self._training.note = f'{step:,}/{self._num_steps:,}  {self._values}'

  def metrics(self, step: int, values: dict[str, float], seconds_left: float | None) -> None:
    """Shows loss, gradient norm, rate, tokens/s, MFU if known, and time left of a logged step."""
    loss, *more = [f'loss {values["train/loss"]:.4f}', f'grad norm {values["train/grad_norm"]:.2f}']
    if 'train/learning_rate' in values:  # an optimizer that is passed from Python does not report it
      more.append(f'lr {values["train/learning_rate"]:.2e}')
    speed, rest = [], []
    if 'train/tokens_per_second' in values:
      speed.append(f'{values["train/tokens_per_second"]:,.0f} tokens/s')
    if 'train/mfu' in values:
      rest.append(f'MFU {values["train/mfu"]:.1%}')
    if values.get('train/data_wait', 0) > 0.05:
      rest.append(f'waits for data {values["train/data_wait"]:.0%} of the time')
    left = [] if seconds_left is None else [f'{duration(seconds_left)} left']
    self._values = '  '.join([loss, *speed, *left, *rest])
    self.step(step)
    kept = [] if LINE.live else [*rest, *left]  # the live line has them
    self._unprinted = f'step {step}/{self._num_steps}  ' + '  '.join([loss, *more, *speed, *kept])
    points = LINES_KEPT * step // self._num_steps
    if not LINE.live or points > self._points:
      self._points = points
      self._print_metrics()

  def results(self, step: int, values: dict[str, float]) -> None:
    """Prints the results of an evaluation, below the metrics of the newest logged step."""
    self._print_metrics()
    self.line(f'step {step}: ' + '  '.join(
        f'{name} {value:.4f}' for name, value in values.items() if name != 'val/tokens'))

  def sample(self, step: int, prompt: str, text: str) -> None:
    """Prints the first lines of a sample, if config.log.samples says so."""
    if not self._samples:
      return
    shown = ''.join(c if c.isprintable() or c == '\n' else '\N{REPLACEMENT CHARACTER}' for c in text.expandtabs())
    short = '\n'.join(shown[:SAMPLE_CHARACTERS].split('\n')[:SAMPLE_LINES])
    end = ' ...' if len(short) < len(shown) else ''
    self.line(f'step {step}: sample, ' + (f'prompt {prompt!r}:' if prompt else 'new document:'))
    self._print('\n'.join('  | ' + line for line in (short + end).split('\n')))

  def saving(self, step: int, monitor: str, best: float | None) -> None:
    self.line(f'step {step}: saving checkpoints/{step}' + ('' if best is None else f' (best {monitor} {best:.4f})'))

  def progress(self, name: str) -> Progress:
    """A task that the live line shows instead of the training."""
    return Progress(name, shown=self._enabled)

  def line(self, text: str) -> None:
    """Prints a line, which a terminal wraps at words."""
    self._print(wrap(text, 2, columns()))

  def _print(self, text: str) -> None:
    if self._enabled:
      print(text, flush=True)

  def _print_metrics(self) -> None:
    if self._unprinted:
      self.line(self._unprinted)
    self._unprinted = ''

  def close(self) -> None:
    if self._first is not None:
      self._first.close()
    self._training.close()

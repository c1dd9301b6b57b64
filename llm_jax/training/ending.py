"""What a run prints of its folder, and at its end: its result, and the commands to go on with."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from llm_jax.base.progress import duration
from llm_jax.base.redaction import hide, public_command
from llm_jax.config import Config
from llm_jax.training.status import read_status


def ending(config: Config, workdir: Path, arguments: Sequence[str], named: str = '') -> list[str]:
  """Lines on a finished run, with commands that work as printed; [] if it has not finished.

  `arguments` are those of the command that trained it; `named` is the folder as it was named, which may be a URL.
  """
  status = read_status(workdir)
  if status['state'] != 'finished':
    return []
  best = f'; best {status["monitor"]} {status["best"]:.4f}' if status.get('best') is not None else ''
  reached = max(config.num_steps, status['step'])  # more than num_steps if an earlier launch went on for longer
  named = hide(named or str(workdir))
  run, steps = shlex.quote(named), 2 * reached
  use = f"generate --workdir={run} --prompt=''" if config.writes else f'predict --workdir={run} --text=TEXT'
  further = without(arguments, '--config.num_steps', '--workdir', '--config.optim.rewarm')
  commands = [use, f'evaluate --workdir={run}', f'export --workdir={run} --out=exported --weight_bits=32']
  notes = ['text from the model' if config.writes else 'predictions', 'the loss on all validation data',
           'safetensors, config and tokenizer']
  if not config.num_epochs:  # which would determine num_steps
    old, new = (float(jax.jit(config.optim.make_schedule(n))(reached)) for n in (reached, steps))
    rises = abs(new - old) > 1e-3 * new
    commands.append(f'train {shlex.join(public_command(further))} --workdir={run} --config.num_steps={steps}' + (
        f' --config.optim.rewarm={reached},{max(1, reached // 10)}' if rises else ''))
    notes.append(f'goes on to step {steps}' + ('; the learning rate rises again from 0' if rises else ''))
  if not config.eval.every:
    del commands[1], notes[1]
  tool = program()
  lines = [f'{tool} {command}' for command in commands] + [f'{beside(tool, "tensorboard")} --logdir {run}']
  return [f'finished: step {status["step"]} after {duration(status["seconds"])}{best}; all files are in '
          f'{named}',
          'next:', *(f'  {line}  # {note}' for line, note in zip(lines, [*notes, 'curves and samples'], strict=True))]


def workdir_line(workdir: Path | str) -> str:
  """A line of the summary: where the run is, and how to watch it."""
  named = hide(str(workdir))
  return f'workdir: {named}; to watch the run: tensorboard --logdir {named}'


def without(arguments: Sequence[str], *flags: str) -> list[str]:
  """The arguments without these flags and their values: --flag=value or --flag value."""
  values = {i + 1 for i, word in enumerate(arguments) if word in flags}
  return [word for i, word in enumerate(arguments) if word.partition('=')[0] not in flags and i not in values]


def program() -> str:
  """How to call llm-jax here: by its name, by its path beside this Python, or as a module."""
  if shutil.which('llm-jax'):
    return 'llm-jax'
  script = Path(sys.executable).parent / 'llm-jax'
  return shlex.quote(os.path.relpath(script)) if script.is_file() else f'{shlex.quote(sys.executable)} -m llm_jax'


def beside(tool: str, name: str) -> str:
  """The program `name` in the folder of the llm-jax script, if that is not on the path."""
  return str(Path(tool).with_name(name)) if tool.endswith('/llm-jax') else name

"""The live line in a terminal: it does not garble what is printed, and leaves nothing behind; elsewhere plain lines."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from program import ROOT

PROGRAM = '''
import sys, time
from llm_jax.base.progress import Progress
with Progress('training', 100) as training:
  for step in range(0, 100, 10):
    training.n, training.note = step, f'{step}/100  loss 1.2345  12,345 tokens/s  MFU 12.3%  1:23 left'
    time.sleep(0.05)
    print(f'line {step} of stdout, with a /path/that/is/long/enough/to/be/wrapped/by/a/narrow/terminal', flush=True)
    if step == 50:
      with Progress('evaluating', 7, 'rows') as inner:
        for _ in range(7):
          time.sleep(0.1)
          inner.update(1)
        print('WARNING: a line of stderr', file=sys.stderr, flush=True)
      with Progress('sampling'):
        time.sleep(0.3)
print('end')
'''
LINES = [f'line {step} of stdout, with a /path/that/is/long/enough/to/be/wrapped/by/a/narrow/terminal'
         for step in range(0, 100, 10)]
LINES = [*LINES[:6], 'WARNING: a line of stderr', *LINES[6:], 'end']


def run_in_terminal(program, width, **variables):
  """What the program writes to a terminal of so many columns."""
  own, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 50, width, 0, 0))
  kept = {name: value for name, value in os.environ.items() if name not in ('NO_COLOR', 'COLUMNS', 'LINES')}
  env = kept | {'PYTHONPATH': str(ROOT), 'TERM': 'xterm-256color'} | variables
  process = subprocess.Popen([sys.executable, '-c', program], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
  os.close(theirs)
  written = read_to_end(own)
  assert process.wait() == 0, written
  return written.decode()


def read_to_end(terminal):
  """All that is written to a terminal until its last process closes it."""
  written = b''
  with contextlib.suppress(OSError):  # the terminal was closed
    while chunk := os.read(terminal, 65536):
      written += chunk
  os.close(terminal)
  return written


def screen(written, width):
  """The rows of a terminal of so many columns after this output: a small part of what a terminal knows."""
  rows, row, column = [[]], 0, 0
  for token in re.findall(r'\x1b\[[?\d;]*[A-Za-z]|.', written, re.DOTALL):
    if token[0] == '\x1b':
      code, number = token[-1], int(re.sub(r'\D', '', token) or 1)
      assert code in 'AKmhl', token
      row -= number if code == 'A' else 0
      rows[row] = [] if code == 'K' else rows[row]
    elif token == '\r':
      column = 0
    elif token == '\n':
      row += 1
    else:
      if column == width:
        row, column = row + 1, 0
      rows += [[] for _ in range(row + 1 - len(rows))]
      rows[row] += [' '] * (column + 1 - len(rows[row]))
      rows[row][column] = token
      column += 1
    rows += [[] for _ in range(row + 1 - len(rows))]
  return [''.join(cells).rstrip() for cells in rows]


TRAINING = '''
from llm_jax.config import LogConfig
from llm_jax.training.console import Console
console = Console(1000, 0, LogConfig())
for step in range(10, 1001, 10):
  console.metrics(step, {'train/loss': 2000 - step, 'train/grad_norm': 1.0, 'train/learning_rate': 1e-3,
                         'train/tokens_per_second': 12345.0, 'train/mfu': 0.4}, 60.0)
  if step % 510 == 0:
    console.results(step, {'val/loss': 3.0, 'val/tokens': 8.0})
console.close()
'''


def test_a_terminal_keeps_metrics_of_evenly_spaced_and_of_evaluated_steps():
  rows = [row for row in screen(run_in_terminal(TRAINING, 80, JAX_PLATFORMS='cpu'), 80) if row]
  steps = [10, *range(50, 1001, 50)]
  expected = [f'step {step}/1000  loss {2000 - step}.0000  grad norm 1.00  lr 1.00e-03  12,345 tokens/s'
              for step in sorted([*steps, 510])]
  expected.insert(expected.index(next(row for row in expected if 'step 510/' in row)) + 1, 'step 510: val/loss 3.0000')
  assert rows == expected


@pytest.mark.parametrize('width', [120, 40])
@pytest.mark.parametrize('variables', [{}, {'NO_COLOR': '1'}], ids=['color', 'no color'])
def test_lines_and_live_line_do_not_garble_each_other(width, variables):
  written = run_in_terminal(PROGRAM, width, **variables)
  expected = [line[i:i + width] for line in LINES for i in range(0, len(line), width)]
  assert [row for row in screen(written, width) if row] == expected
  for name in ('training', 'evaluating', 'sampling'):
    assert name in written
  assert ('\x1b[3' in written) == (not variables and width >= 60), 'only the bar has colors'
  assert '\x1b[?25l' not in written, 'the cursor is not hidden, as a killed program could not show it again'


def test_the_live_line_is_one_line_in_a_narrow_terminal():
  written = run_in_terminal(PROGRAM, 40)
  shown = [re.sub(r'\x1b\[[?\d;]*[A-Za-z]', '', row) for row in re.split(r'[\r\n]+', written) if 'training' in row]
  assert shown and all(len(row) <= 40 for row in shown), shown


def test_a_dumb_terminal_gets_plain_lines():
  written = run_in_terminal(PROGRAM, 120, TERM='dumb')
  assert '\x1b' not in written and [row for row in screen(written, 120) if row] == LINES


def test_without_a_terminal_lines_of_stdout_are_all_there_is():
  done = subprocess.run([sys.executable, '-c', PROGRAM], env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
                        capture_output=True)
  assert done.stdout.splitlines() == [line for line in LINES if 'stderr' not in line]
  assert done.stderr.splitlines() == ['WARNING: a line of stderr']


def test_long_work_without_a_terminal_reports_now_and_then(monkeypatch, capsys):
  from llm_jax.base import progress
  monkeypatch.setattr(progress, 'PLAIN_SECONDS', 0.0)
  with progress.progress_bar('tokenizing', 4_000_000, 'B') as bar:
    bar.update(1_000_000)
  printed = capsys.readouterr()
  assert printed.out == '' and re.fullmatch(r'tokenizing: 1.0 MB/4.0 MB  \S+ \wB/s  \S+ left\n', printed.err)


def test_a_redirected_stdout_is_not_moved_to_the_terminal(tmp_path):
  program = PROGRAM.replace('import sys, time', f'import sys, time\nsys.stdout = open({str(tmp_path / "out")!r}, "w")')
  written = run_in_terminal(program, 120)
  assert (tmp_path / 'out').read_text().splitlines() == [line for line in LINES if 'stderr' not in line]
  assert [row for row in screen(written, 120) if row] == ['WARNING: a line of stderr']


def test_text_that_looks_like_markup_is_printed_as_it_is():
  """Also without an end of line, which rich buffers."""
  program = PROGRAM.replace("print('end')", """
with Progress('training', 3):
  print('x [/b] [red]y[/red] :smile:', end='', flush=True)
  print()
print('end')""")
  assert 'x [/b] [red]y[/red] :smile:' in screen(run_in_terminal(program, 120), 120)


SIGNALLED = """
import time
from llm_jax.base.progress import Progress
from llm_jax.base.stopping import StopSignal
with StopSignal() as stop, Progress('training', 10) as task:
  for number in range(100_000):
    print('a line of a log that fills the buffer of the terminal', number, flush=True)
    if stop.requested:
      break
print('end')
"""


def test_a_signal_during_a_write_to_the_terminal_does_not_lock_the_process():
  """A terminal that nobody reads, as after Ctrl-S, blocks the write; the handler then must not need its lock."""
  own, theirs = pty.openpty()
  env = os.environ | {'PYTHONPATH': str(ROOT), 'TERM': 'xterm-256color', 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen([sys.executable, '-c', SIGNALLED], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
  os.close(theirs)
  written = os.read(own, 1)  # it has begun to print
  time.sleep(1)
  process.terminate()
  time.sleep(0.5)
  killer = threading.Timer(60, process.kill)
  killer.start()
  written += read_to_end(own)
  killer.cancel()
  assert process.wait() == 0 and b'SIGTERM: saving' in written and b'end' in written

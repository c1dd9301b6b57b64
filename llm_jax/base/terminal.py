"""Text for people: lines are wrapped at words in a terminal, and stay whole where the output is piped."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap


def columns() -> int | None:
  """The width of the terminal that stdout is; None if it is none."""
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrap(text: str, indent: int, width: int | None) -> str:
  """The text, with further lines indented, if it is wider than `width`; words and paths stay whole."""
  if width is None or len(text) <= width:
    return text
  indent = min(indent, width // 2)
  return textwrap.fill(text, width, subsequent_indent=' ' * indent, break_long_words=False, break_on_hyphens=False)


def wrap_paragraphs(text: str, width: int) -> str:
  """A docstring for `width` columns: paragraphs are filled; indented lines, such as commands, are wrapped singly.

  Of an indented line 'NAME    what it is' the text is wrapped below itself, of a command by a backslash.
  """
  lines = []
  for line in re.sub(r'(?<=\S)\n(?=\S)', ' ', text).splitlines():  # a paragraph becomes one line
    term = re.match(r'  \S+(?: \S+)* {2,}(?=\S)', line)
    if line.startswith('  llm-jax '):
      lines += _command(line, width)
    else:
      lines.append(wrap(line, term.end() if term else len(line) - len(line.lstrip()), width))
  return '\n'.join(lines)


def _command(line: str, width: int) -> list[str]:
  """A command as lines that a shell joins again; a comment after it that does not fit goes above it."""
  command, _, comment = line.partition('  # ')
  if len(line) <= width:
    return [line]
  words = re.findall(r"""(?:'[^']*'|"[^"]*"|\S)+""", command)
  lines, begin = [f'  # {comment}'] if comment else [], '  '
  for word in words:
    if len(begin) + len(word) + 2 > width and begin.strip():
      lines.append(begin + '\\')
      begin = ' ' * 6
    begin += f'{word} '
  return [*lines, begin.rstrip()]

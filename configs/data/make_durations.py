"""Writes durations.jsonl: spans of time as people write them, and their length. Our own; the same file everywhere.

  python configs/data/make_durations.py

Each line has a `text` ('1 h 05 min', '2:03:10', 'three days', '95 minutes and 20 seconds') and `log10_seconds`.
"""

import json
import math
import random
from pathlib import Path

NUMBERS = ['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve']
UNITS = {  # seconds: the most of it that is written, its names
    604800: (8, ('week', 'weeks', 'w')), 86400: (13, ('day', 'days', 'd')), 3600: (47, ('hour', 'hours', 'h')),
    60: (180, ('minute', 'minutes', 'min')), 1: (600, ('second', 'seconds', 's')),
}
COUNT = 6000


def written(number: int, unit: int, rng: random.Random, short: bool) -> str:
  one, many, symbol = UNITS[unit][1]
  if short:
    return f'{number}{rng.choice(["", " "])}{symbol}'
  said = NUMBERS[number - 1] if 0 < number <= 12 and rng.random() < 0.5 else str(number)
  return f'{said} {one if number == 1 else many}'


def duration(rng: random.Random) -> tuple[str, int]:
  """(text, seconds): one unit, two that follow each other, or a clock's h:mm:ss or m:ss."""
  if rng.random() < 0.25:
    h, m, s = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    return (f'{h}:{m:02}:{s:02}', 3600 * h + 60 * m + s) if h else (f'{m}:{s:02}', 60 * m + s)
  units, short = list(UNITS), rng.random() < 0.5
  first = rng.randrange(len(units))
  number = rng.randint(1, UNITS[units[first]][0])
  parts, seconds = [written(number, units[first], rng, short)], number * units[first]
  if first + 1 < len(units) and rng.random() < 0.6:
    number = rng.randint(1, units[first] // units[first + 1] - 1)
    parts.append(written(number, units[first + 1], rng, short))
    seconds += number * units[first + 1]
  return rng.choice([' ', ' and ', ', '] if not short else [' ', '']).join(parts), seconds


def main():
  rng, found = random.Random(0), {}
  while len(found) < COUNT:
    text, seconds = duration(rng)
    if seconds:
      found[text] = round(math.log10(seconds), 5)
  path = Path(__file__).with_name('durations.jsonl')
  path.write_text(''.join(json.dumps({'text': text, 'log10_seconds': x}) + '\n' for text, x in found.items()))
  print(f'{path}: {len(found)} durations')


if __name__ == '__main__':
  main()

"""Writes modular.jsonl: all divisions modulo 97, 9,312 of them, as `text` ('5/3') and `quotient` (34, as 34 * 3 = 5).

  python configs/data/make_modular.py
"""

import json
from pathlib import Path

PRIME = 97


def main():
  path = Path(__file__).with_name('modular.jsonl')
  with open(path, 'w') as f:
    for quotient in range(PRIME):
      for divisor in range(1, PRIME):
        f.write(json.dumps({'text': f'{quotient * divisor % PRIME}/{divisor}', 'quotient': quotient}) + '\n')
  print(f'{path}: {PRIME * (PRIME - 1)} divisions')


if __name__ == '__main__':
  main()

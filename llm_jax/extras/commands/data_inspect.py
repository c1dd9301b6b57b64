"""Shows the training data of a config: counts, what filters dropped, document lengths, rows as the model reads them.

Without a config, the fields of config.data are flags.

  llm-jax data inspect --config=gpt_small --out=data.png
  llm-jax data inspect --path='notes/**/*.md' --seq_len=256 --packing=best_fit
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program, waiting
from llm_jax.commands.data_prepare import add_data, parse, table
from llm_jax.extras.figures import load_pyplot, write_picture

if TYPE_CHECKING:
  import numpy as np

  from llm_jax.data.config import DataConfig
  from llm_jax.data.open import Data
  from llm_jax.data.rows.examples import Examples
  from llm_jax.data.rows.tasks import Features
  from llm_jax.data.stores.store import TokenStore
  from llm_jax.data.tokenizers.tokenizer import Tokenizer

BAR = 50  # characters
BEGIN, END = '\u27e6', '\u27e7'  # around learnt tokens


def parser() -> flags.Parser:
  parser = flags.Parser('data inspect', __doc__, fields='llm_jax.data.config:DataConfig')
  parser.add_argument('--part', default='train', choices=('train', 'val', 'test'), help='the part of the data')
  parser.add_argument('--rows', type=int, default=2, help='number of rows to show per source')
  parser.add_argument('--seed', type=int, default=0, help='selects the rows')
  parser.add_argument('--out', type=Path, help='PNG file to write: histograms of document lengths and images of rows '
                      '(default: none)')
  add_data(parser)
  return parser


def main(argv: list[str]) -> None:
  config, args = parse(parser(), argv)
  import numpy as np

  from llm_jax.data.open import open_data, open_examples
  from llm_jax.data.sources.filters import Report
  if config.streaming:
    raise ConfigError('config.data.streaming: a stream has no rows to inspect; set streaming=False')
  if args.rows < 0 or args.seed < 0:
    raise ConfigError(f'--rows and --seed must be 0 or more; got {args.rows} and {args.seed}')
  waiting('reading data')
  data = open_data(config)
  print(table(data))
  for name, report in data.reports.items():
    print('\n'.join(f'{name}: {line}' for line in Report.from_dict(report).lines()))
  if not data.splits[args.part]:
    raise ConfigError(f'--part: {args.part} is empty; set config.data.{args.part}_fraction or '
                      f'config.data.{args.part}_path')
  examples = {}
  for name, store in data.splits[args.part].items():
    print(f'\n{args.part}/{name}: tokens per document')
    print('\n'.join(histogram(document_lengths(store))))
    if store.classes:
      print('labels: ' + ', '.join(f'{value} {label!r}' for value, label in enumerate(store.classes)))
    examples[name] = open_examples(config, data, store, train=args.part == 'train')
    print(f'{len(examples[name]):,} rows of {config.seq_len} tokens, task {config.task}, packing {config.packing}; '
          f'{examples[name].dropped_tokens:,} tokens are in no row')
    for index in np.random.default_rng(args.seed).permutation(len(examples[name]))[:args.rows].tolist():
      print(f'\nrow {index}')
      print_lines(row_lines(row_of(examples[name], index, args.seed), data, config))
  if args.out is not None:
    draw_data(data.splits[args.part], examples, args.seed, args.out)
    print(f'\nwrote {args.out}')


def document_lengths(store: TokenStore) -> np.ndarray:
  import numpy as np
  return np.diff(store.starts, append=len(store.tokens))


def histogram(lengths: np.ndarray) -> list[str]:
  """Lines with one bar per power of two."""
  import numpy as np
  bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
  width = max(bins.max(), 1)
  lines = [f'{"up to":>6} {1 << power:>12,} {"#" * -(-count * BAR // width):{BAR}} {count:,}'
           for power, count in enumerate(bins.tolist()) if bins[power:].any() and bins[:power + 1].any()]
  return [*lines, f'{"median":>6} {int(np.median(lengths)):>12,}   mean {lengths.mean():,.1f}   '
                  f'longest {lengths.max():,}']


def row_of(examples: Examples, index: int, seed: int) -> Features:
  import numpy as np
  return examples.make(index, np.random.default_rng([seed, index]))


def row_lines(features: Features, data: Data, config: DataConfig) -> list[str]:
  """Lines with the inputs and targets of each piece; tokens are separated by |, special ones in <>."""
  import numpy as np
  names = token_names(data.tokenizer, data.vocab_size, config.task_settings.num_sentinels)
  segments = features.get('segment_ids', np.ones_like(features['tokens']))
  mask, has_label = features['loss_mask'] > 0, 'labels' in features
  lines = []
  if 'encoder_tokens' in features:
    real = features['encoder_segment_ids'] > 0
    other = data.encoder_tokenizer
    read_names = names if other is None else token_names(other, len(other.token_bytes), 0)
    lines.append(f'  encoder reads {real.sum()}: {join_tokens(features["encoder_tokens"][real], read_names)}')
  for segment in range(1, int(segments.max(initial=0)) + 1):
    inside = segments == segment
    learnt = inside & mask
    lines.append(f'  piece {segment}: {inside.sum()} tokens' + ('' if has_label else f', {learnt.sum()} learnt'))
    if config.task_settings.chats:
      lines.append(f'    {masked_tokens(features["tokens"][inside], features["targets"][inside], mask[inside], names)}')
      continue
    lines.append(f'    reads   {join_tokens(features["tokens"][inside], names)}')
    if learnt.any() and not has_label:
      lines.append(f'    learns  {join_tokens(features["targets"][learnt], names)}')
  padding = int((segments == 0).sum())
  if has_label:
    lines.append(f'  learns the label {features["labels"]}')
  return [*lines, *([f'  padding: {padding}'] if padding else [])]


def token_names(tokenizer: Tokenizer | None, vocab_size: int, num_sentinels: int) -> list[str]:
  """The printed name of each id."""
  if tokenizer is None:
    names = [str(i) for i in range(vocab_size)]
  else:
    special = {i: name for name, i in getattr(tokenizer, 'special_tokens', {}).items()} or {
        tokenizer.bos_id: '<bos>', tokenizer.eos_id: '<eos>'} if tokenizer.bos_id != tokenizer.eos_id else {
        tokenizer.bos_id: '<eot>'}
    names = [special.get(i) or (repr(b.decode(errors='replace'))[1:-1] if b else f'<{i}>')
             for i, b in enumerate(tokenizer.token_bytes)]
  return names + [f'<sentinel {k}>' for k in range(num_sentinels)]


def masked_tokens(tokens: np.ndarray, targets: np.ndarray, mask: np.ndarray, names: list[str]) -> str:
  """The tokens of a conversation; what is learnt is between BEGIN and END."""
  import numpy as np
  text, before = '', False
  for token, learnt in zip([*tokens.tolist(), int(targets[-1])], np.append(False, mask).tolist(), strict=True):
    end, begin = END if before and not learnt else '', BEGIN if learnt and not before else ''
    text, before = f'{text}{end}{"|" if text else ""}{begin}{names[token]}', learnt
  return text + (END if before else '')


def print_lines(lines: list[str]) -> None:
  """Prints lines; in a terminal what is between BEGIN and END in colour."""
  import rich.console
  import rich.text
  console = rich.console.Console(highlight=False, soft_wrap=True)
  for line in lines:
    if not console.is_terminal:
      print(line)
      continue
    text = rich.text.Text()
    for number, part in enumerate(re.split(f'[{BEGIN}{END}]', line)):
      text.append(part, style='bold green' if number % 2 else '')
    console.print(text)


def join_tokens(ids: Iterable[int], names: list[str], most: int = 160) -> str:
  ids = [int(i) for i in ids]
  shown = '|'.join(names[i] for i in ids[:most])
  return shown + (f' ... {len(ids) - most} more' if len(ids) > most else '')


def draw_data(stores: dict[str, TokenStore], examples: dict[str, Examples], seed: int, out: Path) -> None:
  """Draws histograms, and below them 24 rows of each source: one colour per piece, pale where the loss is masked."""
  import numpy as np
  plt = load_pyplot('--out')
  fig, axes = plt.subplots(2, len(stores), figsize=(6 * len(stores) + 2, 8), squeeze=False, layout='constrained')
  colours = plt.get_cmap('tab10')(np.arange(10))[:, :3]
  for (name, store), (above, below) in zip(stores.items(), axes.T, strict=True):
    lengths = document_lengths(store)
    above.hist(lengths, bins=np.geomspace(1, max(2, lengths.max()), 40))
    above.set(xscale='log', title=f'{name}: {len(lengths):,} documents', xlabel='tokens', ylabel='documents')
    indices = np.random.default_rng(seed).permutation(len(examples[name]))[:24].tolist()
    image = []
    for features in (row_of(examples[name], i, seed) for i in indices):
      segments = features.get('segment_ids', np.ones_like(features['tokens']))
      colour = np.where((segments > 0)[:, None], colours[segments % 10], 1.0)
      image.append(np.where((features['loss_mask'] > 0)[:, None], colour, 0.65 + 0.35 * colour))
    below.imshow(np.stack(image), aspect='auto', interpolation='nearest')
    below.set(title='rows: one colour per piece, pale: not learnt', xlabel='position', ylabel='row')
  write_picture(out, fig, dpi=110)
  plt.close(fig)


if __name__ == '__main__':
  run_as_program(main)

"""Generates text with a trained run: continues a text, or answers a message if the run learned conversations.

The first sample is printed while it is generated; stdout receives nothing but text. A prompt that is longer than the
model's context is continued from its end, unless the model has learned to answer whole prompts.

  llm-jax generate runs/gpt_small --prompt='def main('
  llm-jax generate runs/gpt_small --num_samples=3 --num_tokens=100 --temperature=0.6 --top_k=40
  llm-jax generate runs/chat_small --prompt='What does os.path.join do?' --system='Be brief.'
"""

from __future__ import annotations

import codecs
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llm_jax.base import flags
from llm_jax.base.process import run_as_program
from llm_jax.base.progress import Progress
from llm_jax.infer.options import check_options

if TYPE_CHECKING:
  import numpy as np

OPTIONS = ('num_samples', 'num_tokens', 'temperature', 'top_k', 'top_p', 'num_beams', 'seed')


def parser() -> flags.Parser:
  parser = flags.Parser('generate', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser)
  parser.add_argument('--prompt', default='', help='the text to continue, or for a run of task chat the '
                      'message to answer (default: start a new document)')
  parser.add_argument('--system', default='', help='the system message, for a run of task chat')
  parser.add_argument('--num_samples', type=int, default=1, help='number of texts')
  parser.add_argument('--num_tokens', type=int, default=256, help='maximum; a sample also ends with its document')
  parser.add_argument('--temperature', type=float, default=0.8, help='0: always take the most likely token')
  parser.add_argument('--top_k', type=int, default=0, help='sample only from the k most likely tokens; 0: all')
  parser.add_argument('--top_p', type=float, default=1.0, help='sample only from the most likely tokens with this '
                      'total probability')
  parser.add_argument('--num_beams', type=int, default=0, help='use beam search with this many hypotheses; 0: sample')
  parser.add_argument('--seed', type=int, default=0, help='of the random numbers')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  options = {name: getattr(args, name) for name in OPTIONS}
  check_options(options)
  flags.apply(args)
  from llm_jax.infer.text import goes_on
  from llm_jax.infer.trained import load_writer
  prompt = prompt_of(args.prompt, args.system)
  trained = load_writer(args.workdir, args.checkpoint, args.mesh, trust=args.trust, prompt=prompt,
                        num_tokens=args.num_tokens)
  columns = begun(lambda: trained.tokens(prompt, **options))
  print_samples(args.prompt if goes_on(trained.run.model, trained.run.tokenizer) else '', columns,
                trained.run.tokenizer, 1 if args.num_beams else args.num_samples)


def prompt_of(prompt: str, system: str) -> Any:
  """The text, or with a system message the messages."""
  return (('system', system), ('user', prompt)) if system else prompt


def begun(start: Callable[[], Iterable[np.ndarray]]) -> Iterator[np.ndarray]:
  """The columns that start() gives, with the first one computed; a terminal shows the time that this takes."""
  from llm_jax.base.multihost import is_first
  with Progress('compiling', shown=is_first()):
    columns = iter(start())
    first = list(itertools.islice(columns, 1))
  return itertools.chain(first, columns)


def print_samples(prompt: str, columns: Iterable[np.ndarray], tokenizer: Any, num_samples: int) -> None:
  """Prints the first sample as it is generated, then the others, each of several under a heading."""
  from llm_jax.data.tokenizers.tokenizer import stop_ids

  def heading(i: int) -> str:
    return f'--- sample {i} of {num_samples} ---\n' if num_samples > 1 else ''

  rows: list[list[int]] = [[] for _ in range(num_samples)]
  ended, stops = [False] * num_samples, stop_ids(tokenizer)
  decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # holds back incomplete characters
  show(heading(1) + prompt)
  for column in columns:
    for i, token in enumerate(column.tolist()):
      ended[i] = ended[i] or token in stops
      if not ended[i]:
        rows[i].append(token)
        if i == 0:
          show(decoder.decode(tokenizer.token_bytes[token]))
    if all(ended):
      break
  show(decoder.decode(b'', final=True) + '\n')
  for i, row in enumerate(rows[1:], start=2):
    text = b''.join(tokenizer.token_bytes[token] for token in row).decode(errors='replace')
    show(f'\n{heading(i)}{prompt}{text}\n')


def show(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


if __name__ == '__main__':
  run_as_program(main)

"""Compares our model of lm_eval with lm_eval's own `hf` on the same weights, request by request.

  python -m benchmarks.lm_eval_parity --workdir=runs/gpt_small --hf=exported_hf --python=/tmp/hfenv/bin/python

`--hf` is a folder in the format of transformers with the weights and the tokenizer of the run; `--python` has torch,
transformers and lm_eval. Both compute in float32. The texts are this project's documentation. `hf` gets bos by
add_bos_token=True, as our runs are trained; for rolling likelihoods it does not, as it would score bos itself.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
LIMIT = 1e-3  # nats per token
NUM_TOKENS = 16  # of generated texts


class Request(NamedTuple):
  """What lm_eval's Instance holds, for both sides."""

  args: tuple


def requests(number: int, longest: int, answer: int, count: Callable[[str], int]) -> dict[str, list[tuple]]:
  """Requests of the three kinds, with contexts from none to `longest` characters and continuations up to `answer`.

  `count` counts tokens: `hf` refuses a continuation that adds none, as its first characters end a token of the context.
  """
  rng = random.Random(0)
  text = '\n'.join(path.read_text() for path in sorted((ROOT / 'docs').glob('*.md')) if path.is_file())
  text = ''.join(c for c in text if c.isascii())
  def part(length: int) -> str:
    begin = rng.randrange(len(text) - length)
    return text[begin:begin + length]

  pairs = [('', part(min(20, answer))), ('a  ', part(5)), ('def f(x):\n', '  return x')]
  for _ in range(number):
    whole = part(rng.randint(10, longest))
    cut = rng.randint(1, len(whole) - 1)
    pairs.append((whole[:max(cut, len(whole) - answer)], whole[max(cut, len(whole) - answer):]))
  pairs = [(context, continuation) for context, continuation in pairs
           if (context.strip() or not context) and count(context.rstrip()) < count(context + continuation)]
  rolling = [(part(rng.randint(5, 4 * longest)),) for _ in range(number // 4)]
  options = {'until': ['\n\n'], 'max_gen_toks': NUM_TOKENS, 'do_sample': False}
  return {'loglikelihood': pairs, 'loglikelihood_rolling': rolling,
          'generate_until': [(part(rng.randint(5, longest)), options) for _ in range(number // 4)]}


def answers(models: dict[str, Any], asked: dict[str, list[tuple]]) -> dict[str, list]:
  return {kind: [list(x) if isinstance(x, tuple) else x for x in getattr(models[kind], kind)(
      [Request(tuple(args)) for args in found])] for kind, found in asked.items()}


def ours(workdir: Path, asked: dict[str, list[tuple]]) -> tuple[dict[str, list], list[int]]:
  """(our answers, the number of scored tokens of each rolling text)."""
  import dataclasses

  import jax

  from llm_jax.base.sharding import MeshConfig, make_mesh
  from llm_jax.extras.lm_harness import model_of
  from llm_jax.extras.lm_scores import Scorer
  from llm_jax.extras.selfcheck import set_up
  from llm_jax.infer.load import load_run
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    run = load_run(workdir, mesh)
    setup = set_up(run)  # the model in float32
    scorer = Scorer(dataclasses.replace(run, config=setup.config, model=setup.model), mesh, workdir)
    return (answers(dict.fromkeys(asked, model_of(scorer)), asked),
            [len(scorer.encode(text)) for text, in asked['loglikelihood_rolling']])


def theirs(folder: str) -> None:
  """Answers the requests on stdin by `hf`, and prints JSON."""
  import transformers
  from lm_eval.models.huggingface import HFLM
  asked = json.load(sys.stdin)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='float32')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  if tokenizer.encode('a', add_special_tokens=True)[:1] != [tokenizer.bos_token_id]:
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f'{tokenizer.bos_token} $A', special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)])
  common = {'pretrained': model, 'tokenizer': tokenizer, 'batch_size': 1, 'device': 'cpu'}
  begins, plain = HFLM(**common, add_bos_token=True), HFLM(**common, add_bos_token=False)
  print(json.dumps(answers({'loglikelihood': begins, 'loglikelihood_rolling': plain, 'generate_until': begins}, asked)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=Path)
  parser.add_argument('--hf', required=True, help='folder in the format of transformers')
  parser.add_argument('--python', default=sys.executable, help='a Python with torch, transformers and lm_eval')
  parser.add_argument('--count', type=int, default=40)
  parser.add_argument('--longest', type=int, default=600, help='characters')
  args = parser.parse_args()
  if args.workdir is None:
    theirs(args.hf)
    return
  from llm_jax.data.tokenizers.tokenizer import load_tokenizer
  # `hf` refuses a continuation of more tokens than the context length; a token has a character at least.
  max_len = json.loads((args.workdir / 'config.json').read_text())['model']['max_len']
  tokenizer = load_tokenizer(args.workdir / 'tokenizer.json')
  asked = requests(args.count, args.longest, min(60, max_len // 2), lambda text: len(tokenizer.encode([text])[0]))
  mine, sizes = ours(args.workdir, asked)
  done = subprocess.run([args.python, __file__, f'--hf={args.hf}'], input=json.dumps(asked), stdout=subprocess.PIPE,
                        text=True, check=True)
  other = json.loads(done.stdout.splitlines()[-1])
  pairs = list(zip(mine['loglikelihood'], other['loglikelihood'], strict=True))
  rolling = zip(mine['loglikelihood_rolling'], other['loglikelihood_rolling'], sizes, strict=True)
  texts = list(zip(mine['generate_until'], other['generate_until'], strict=True))
  row = {'workdir': str(args.workdir), 'requests': {kind: len(found) for kind, found in asked.items()},
         'log_p_difference': max(abs(a[0] - b[0]) for a, b in pairs),
         'greedy_differs': sum(a[1] != b[1] for a, b in pairs),
         'rolling_difference_per_token': max(abs(a - b) / max(size, 1) for a, b, size in rolling),
         'texts_differ': sum(a != b for a, b in texts)}
  print(json.dumps(row))
  if row['log_p_difference'] > 60 * LIMIT or row['rolling_difference_per_token'] > LIMIT:
    sys.exit(1)


if __name__ == '__main__':
  main()

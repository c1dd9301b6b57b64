"""Checkpoints that do not fit: another config, other data, other arrays. Refused by name, or resumed where right."""

from __future__ import annotations

import shutil
from pathlib import Path

from faults.lab import STEPS, Lab, arrays_hash, has_traceback, last_lines, resumed_from, saved_steps
from faults.tally import Tally

# Flags that change what the checkpoint was trained with, and the words that the refusal (exit code 78) must have.
REFUSED = (
    ('--config.model.embed_dim=32', 'embed_dim: checkpoint 16, now 32'),
    ('--config.model.num_layers=3', 'num_layers: checkpoint 2, now 3'),
    ('--config.model.num_heads=4', 'num_heads: checkpoint 2, now 4'),
    ('--config.model.vocab_size=300', 'vocab_size: checkpoint'),
    ('--config.model.norm=rms_norm', 'norm: checkpoint'),
    ('--config.model.tie_embeddings=false', 'tie_embeddings: checkpoint'),
    ('--config.optim.chain=adamw', 'config.optim.chain'),
    ('--config.optim.chain=clip_by_global_norm,sgd', 'config.optim.chain'),
    ('--config.optim.chain=clip_by_global_norm,adamw,ema', 'config.optim.chain'),
    ('--config.seed=1', 'config.seed: checkpoint 0, now 1'),
    ('--config.batch_tokens=256', 'rows'),
    ('--config.data.seq_len=8', 'config.data.seq_len: checkpoint 16, now 8'),
    ('--config.data.val_fraction=0.2', 'config.data.val_fraction: checkpoint 0.1, now 0.2'),
    ('--config.data.mask_documents=false', 'config.data.mask_documents'),
    ('--config.data.tokenizer=char', 'config.data.tokenizer'),
    ('--config.data.path={folder}/other.txt', 'config.data.path'),
)
# Flags that may change, and whether the run still ends with the same bits.
ALLOWED = (
    ('--config.checkpoint.every=7', True), ('--config.eval.every=8', True),
    ('--config.optim.learning_rate=1e-3', False), ('--config.model.dropout=0.2', False),
    ('--config.tokens_per_device=64', False), ('devices=2', False),
)
# Arrays rewritten, their manifest adopted: the words of the refusal, (74 or 78), or None to use the older step.
REWRITTEN = (
    ('float16', ('float16', 'float32')), ('int32', ('int32', 'float32')),
    ('transposed', ('stored float32', 'wanted float32')), ('longer', ('stored float32', 'wanted float32')),
    ('missing', ('blocks',)), ('renamed', ('blocks',)), ('extra', ('surplus',)), ('nan', None))
TRIALS = len(REFUSED) + len(ALLOWED) + len(REWRITTEN)


def run(lab: Lab, trials: int) -> Tally:
  tally, base = Tally('wrong'), lab.interrupted()
  (lab.folder / 'other.txt').write_text('other text, of which there is little\n' * 300)
  cases: list[tuple] = [(refused, *case) for case in REFUSED] + [(allowed, *case) for case in ALLOWED]
  cases += [(rewritten, *case) for case in REWRITTEN]
  for trial, what, wanted in cases if trials >= len(cases) else lab.rng.sample(cases, trials):
    folder = lab.copy(base, 'wrong')
    tally.add(what, trial(lab, folder, what, wanted))
    shutil.rmtree(folder)
  return tally


def refused(lab: Lab, folder: Path, flag: str, words: str) -> str:
  job = lab.start(folder, flag.format(folder=lab.folder))
  [code], text = job.wait(), job.text()
  job.end()
  intact = lab.finish(folder) if lab.rng.random() < 0.2 else ''  # the refusal has changed nothing
  return '; '.join(filter(None, (
      f'exit code {code}: {last_lines(text)}' if code != 78 else '',
      f'{words!r} is not in the message: {last_lines(text)}' if words not in text else '',
      'a traceback' if has_traceback(text) else '', intact)))


def allowed(lab: Lab, folder: Path, flag: str, same_bits: bool) -> str:
  devices = 2 if flag == 'devices=2' else 1
  job = lab.start(folder, *([flag] if devices == 1 else []), devices=devices)
  [code], text = job.wait(), job.text()
  job.end()
  if code != 0 or resumed_from(text) != 20:
    return f'exit code {code}, resumed from {resumed_from(text)}: {last_lines(text)}'
  return 'other bits' if same_bits and arrays_hash(folder, STEPS) != lab.reference().final else ''


def rewritten(lab: Lab, folder: Path, change: str, words: tuple[str, ...] | None) -> str:
  """All steps are changed, so that no older one can be used; for NaN only the newest."""
  for step in saved_steps(folder)[0 if words else -1:]:
    program = lab.program(str(folder / 'checkpoints' / str(step)), change, function='faults.rewrite:main')
    if program.wait() != 0:
      return f'the checkpoint could not be rewritten: {last_lines(program.text())}'
  lab.program('check', f'--workdir={folder}', '--adopt').wait()
  if words is None:
    job = lab.start(folder)
    [code], text = job.wait(), job.text()
    job.end()
    return '' if code == 0 and resumed_from(text) == 10 and arrays_hash(folder, STEPS) == lab.reference().final else (
        f'exit code {code}, resumed from {resumed_from(text)}: {last_lines(text)}')
  job = lab.start(folder)
  [code], text = job.wait(), job.text()
  job.end()
  return '; '.join(filter(None, (
      f'exit code {code}: {last_lines(text)}' if code not in (74, 78) else '',
      f'{words} are not in the message: {last_lines(text)}' if not all(word in text for word in words) else '',
      'a traceback' if has_traceback(text) else '')))

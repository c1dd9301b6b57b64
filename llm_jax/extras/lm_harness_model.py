"""A run as a model of the package lm_eval, named llm_jax. It imports lm_eval; lm_harness.py loads it when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from llm_jax.base.sharding import use_mesh
from llm_jax.extras.lm_scores import Decoding, Scorer
from llm_jax.infer.mesh import loaded_on_mesh

DEFAULT_TOKENS = 256  # generated for a task that sets no number, as by lm_eval's other models
LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')  # names for it, the first wins


@register_model('llm_jax')
class RunModel(LM):
  """Answers the requests of lm_eval's tasks with a Scorer, or with one of the run in `workdir`."""

  def __init__(self, workdir: str = '', checkpoint: str = 'latest', mesh: str = '', *,
               scorer: Scorer | None = None, **ignored: Any):
    super().__init__()
    if scorer is None:
      with loaded_on_mesh(Path(workdir), checkpoint, mesh) as run:
        scorer = Scorer(run, run.mesh, Path(workdir))
    self.scorer, self._seed = scorer, 0

  @property
  def tokenizer_name(self) -> str:
    return 'llm_jax'

  def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    with use_mesh(self.scorer.mesh, self.scorer.run.config.mesh):
      found = self.scorer.score([self.scorer.pair(*request.args) for request in requests])
    return self._note('loglikelihood', requests, [tuple(score) for score in found])

  def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
    windows = [self.scorer.windows(request.args[0]) for request in requests]
    with use_mesh(self.scorer.mesh, self.scorer.run.config.mesh):
      scores = iter(self.scorer.score([pair for pairs in windows for pair in pairs]))
    return self._note('loglikelihood_rolling', requests, [sum(next(scores).log_p for _ in pairs) for pairs in windows])

  def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
    groups: dict[Decoding, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(decoding_of(request.args[1]), []).append(i)
    texts = [''] * len(requests)
    for decoding, places in groups.items():
      prompts = [[self.scorer.bos_id, *self.scorer.encode(requests[i].args[0])] for i in places]
      with use_mesh(self.scorer.mesh, self.scorer.run.config.mesh):
        found = self.scorer.generate(prompts, decoding, seed=self._seed)
      self._seed += len(places) if decoding.temperature else 0  # so that repeated requests differ
      for i, text in zip(places, found, strict=True):
        texts[i] = text
    return self._note('generate_until', requests, texts)

  def _note(self, kind: str, requests: list[Any], results: list[Any]) -> list[Any]:
    for request, result in zip(requests, results, strict=True):
      self.cache_hook.add_partial(kind, request.args, result)
    return results


def decoding_of(options: dict[str, Any]) -> Decoding:
  """The generation_kwargs of a task; those that have no meaning here are ignored."""
  until = options.get('until') or []
  temperature = float(options.get('temperature') or 0.0)
  samples = options.get('do_sample', temperature > 0)
  if samples and 'temperature' not in options:
    temperature = 1.0
  num_tokens = next((int(options[name]) for name in LENGTHS if options.get(name)), DEFAULT_TOKENS)
  return Decoding((until,) if isinstance(until, str) else tuple(until), num_tokens, temperature if samples else 0.0,
                  int(options.get('top_k') or 0), float(options.get('top_p') or 1.0))

"""The options of text generation and their legal values. Imports nothing heavy: commands check them first."""

from __future__ import annotations

from llm_jax.base.errors import ConfigError

LEAST = {'num_samples': 1, 'num_tokens': 1, 'temperature': 0, 'top_k': 0, 'num_beams': 0}


def check_options(options: dict[str, float]) -> None:
  """Raises ConfigError with all values that generation cannot use; `options` may lack some."""
  problems = [f'--{name} must be at least {least}; got {options[name]}' for name, least in LEAST.items()
              if not least <= options.get(name, least) < float('inf')]  # also false for NaN
  if not 0 <= options.get('seed', 0) < 1 << 32:
    problems.append(f'--seed must be in 0 to {(1 << 32) - 1}; got {options["seed"]}')
  if not 0 < options.get('top_p', 1) <= 1:
    problems.append(f'--top_p must be in (0, 1]; got {options["top_p"]}')
  if options.get('num_beams', 0) > 0 and options.get('num_samples', 1) > 1:
    problems.append('--num_beams gives one text; leave out --num_samples')
  if problems:
    raise ConfigError('\n'.join(problems))

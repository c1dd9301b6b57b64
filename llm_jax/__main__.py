"""The command line: llm-jax COMMAND [...], or python -m llm_jax COMMAND [...]."""

from __future__ import annotations

import difflib
import importlib
import importlib.util

from llm_jax import __version__
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program

# Command: (module below llm_jax, what it does).
COMMANDS = {
    'train': ('main', 'train a model from a config file'),
    'generate': ('commands.generate', 'generate text with a trained run'),
    'chat': ('extras.commands.chat', 'continue prompts in a loop'),
    'serve': ('extras.commands.serve', 'serve a run by a local page and the OpenAI completions API'),
    'evaluate': ('commands.evaluate', 'measure losses, metrics and answers of a trained run'),
    'predict': ('extras.commands.predict', 'predict classes, numbers or embeddings of texts'),
    'export': ('commands.export', 'write a run as safetensors, config and tokenizer'),
    'runs': ('extras.commands.runs', 'list runs with their state, best result and differences'),
    'plot': ('extras.commands.plot', 'plot metrics of runs'),
    'inspect': ('extras.commands.inspect_run', "print and plot a run's weights and activations by layer"),
    'debug-nan': ('extras.commands.debug_nan', 'find where a step first has a number that is not finite'),
    'schedules': ('extras.commands.schedules', "plot a config's learning rate"),
    'configs': ('extras.commands.configs', 'list the presets, or print one'),
    'config': ('extras.commands.config_fields', 'print all fields of a config with values, origins and comments'),
    'check': ('extras.commands.check', 'report devices and packages, and whether a config runs'),
    'selfcheck': ('extras.commands.selfcheck', 'check on this machine what must not depend on it, with a run'),
    'plan': ('extras.commands.plan', 'plan a run for devices that are not here: memory, time, money'),
    'sweep': ('extras.commands.sweep', "train all trials of a config's sweep"),
    'validate': ('extras.commands.validate', 'check files with a validator of answers'),
    'data prepare': ('commands.data_prepare', 'tokenize the data of a config into the cache'),
    'data merge': ('extras.commands.data_merge', 'merge the shards of prepared data'),
    'data inspect': ('extras.commands.data_inspect', 'print and plot statistics of data'),
    'data cache': ('extras.commands.data_cache', 'list the cache of data, and delete what is used least'),
    'data convert': ('extras.commands.convert', 'convert a pickle to Parquet without running its code'),
}

OTHER_NAMES = {'sample': 'generate', 'eval': 'evaluate', 'pretrain': 'train', 'finetune': 'train', 'list': 'runs'}


def commands() -> dict[str, tuple[str, str]]:
  """COMMANDS without those of extras that this copy of the package lacks."""
  if importlib.util.find_spec('llm_jax.extras') is not None:
    return COMMANDS
  return {name: entry for name, entry in COMMANDS.items() if not entry[0].startswith('extras.')}


def main(argv: list[str]) -> None:
  """Runs the command that argv names. Raises UserErrors."""
  num_words = 2 if argv[:1] == ['data'] else 1
  name, rest, known = ' '.join(argv[:num_words]), argv[num_words:], commands()
  if name in ('--version', '-V', 'version'):
    print(f'llm_jax {__version__}')
  elif not argv or name in ('-h', '--help', 'help', 'data', 'data -h', 'data --help'):
    print('usage: llm-jax COMMAND [...]; llm-jax COMMAND --help shows its flags\n')
    print('\n'.join(f'  {command:14} {line}' for command, (_, line) in known.items()
                    if command.startswith('data ') or argv[:1] != ['data']))
  elif name in known:
    importlib.import_module(f'llm_jax.{known[name][0]}').main(rest)
  else:
    near = difflib.get_close_matches(OTHER_NAMES.get(name, name), known, n=1)
    hint = f'did you mean llm-jax {near[0]}?' if near else f'known: {", ".join(known)}'
    raise ConfigError(f'llm-jax: {name!r} is not a command; {hint}')


def run() -> None:
  """The entry point of the `llm-jax` script."""
  run_as_program(main)


if __name__ == '__main__':
  run()

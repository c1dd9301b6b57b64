"""Files of prompts with answers, and a config file for a tiny run on them."""

import json

CONFIG = '''"""A tiny run on prompts with answers."""
from llm_jax.config import base

def get_config():
  config = base({model!r})
  config.model.num_layers = 1
  config.model.embed_dim = 16
  config.model.num_heads = 2
  config.data.path = {path!r}
  config.data.answer_field = 'answer'
  config.data.split = 'document'
  config.data.val_fraction = 0.2
  config.data.tokenizer = 'word'
  config.data.packing = 'pad'
{lines}
  return config
'''


def write_pairs(path, pairs):
  """Writes (prompt, answer) pairs as JSON lines with the fields text and answer."""
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps({'text': t, 'answer': a}, ensure_ascii=False) + '\n' for t, a in pairs))
  return path


def write_pair_config(path, pairs, model, settings):
  """Writes a config file for a file of pairs; `settings` are further fields by path."""
  lines = '\n'.join(f'  config.{name} = {value!r}' for name, value in settings.items())
  path.write_text(CONFIG.format(model=model, path=str(pairs), lines=lines))

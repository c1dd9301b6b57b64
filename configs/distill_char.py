"""A small student of configs/shakespeare_char.py: half as wide and half as deep, it also learns its teacher's logits.

  llm-jax train --config=configs/shakespeare_char.py
  llm-jax train --config=configs/distill_char.py

Result: val/loss 1.933 over the whole validation part, where its teacher has 1.900 and the same student without a
teacher (--config.loss.terms=next_token, and no distillation.teacher and temperature) 1.984. It has 107,000
parameters, the teacher 804,000. 2 minutes on two cores of a 2.5 GHz Xeon.
"""

from llm_jax.config import base

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def get_config():
  config = base()
  config.num_steps = 2000
  config.batch_tokens = 12 * 64
  config.tokens_per_device = 12 * 64
  config.model.num_layers = 2
  config.model.embed_dim = 64
  config.model.num_heads = 4
  config.model.scan_unroll = 2
  config.data.path = URL
  config.data.sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
  config.data.split = 'tail'
  config.data.val_fraction = 0.1
  config.data.tokenizer = 'char'
  config.data.seq_len = 64
  config.data.mask_documents = False
  config.loss.terms = ('next_token', 'distillation')
  config.loss.distillation.teacher = 'runs/shakespeare_char'
  config.loss.distillation.temperature = 1.0
  config.optim.learning_rate = 2e-3
  config.optim.warmup_cosine.warmup_steps = 100
  config.optim.adamw.b2 = 0.99
  config.eval.every = 500
  config.eval.prompts = ('ROMEO:',)
  config.checkpoint.every = 1000
  return config

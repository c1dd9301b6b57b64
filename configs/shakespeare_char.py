"""nanoGPT's README settings for a laptop: a small character model of Shakespeare.

  llm-jax train --config=configs/shakespeare_char.py

Result: val/loss 1.907 over the whole validation part of 111,540 characters, the mean of 12 seeds (nanoGPT's own code,
one seed: 1.927), in 26 to 39 s on two cores of a Zen 5 EPYC in bfloat16; 1.900 in 2 min 56 s on two cores of a 2.5
GHz Xeon.
"""

from llm_jax.config import base

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def get_config():
  config = base()
  config.num_steps = 2000
  config.batch_tokens = 12 * 64
  config.tokens_per_device = 12 * 64
  config.model.num_layers = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.mlp = 'gelu'
  config.model.scan_unroll = 4
  config.data.path = URL
  config.data.sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
  config.data.split = 'tail'
  config.data.val_fraction = 0.1
  config.data.tokenizer = 'char'
  config.data.seq_len = 64
  config.data.mask_documents = False  # it is one document
  config.optim.learning_rate = 1e-3
  config.optim.warmup_cosine.warmup_steps = 100
  config.optim.warmup_cosine.end_factor = 0.1
  config.optim.adamw.b2 = 0.99
  config.optim.adamw.weight_decay = 0.1
  config.eval.every = 500
  config.eval.sample_tokens = 63
  config.checkpoint.every = 500
  config.log.every = 100
  return config

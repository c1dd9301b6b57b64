"""AGIFORMER's small model (see docs/seeds.md) on Shakespeare: bytes in patches of 4, three thinking steps.

  llm-jax train --config=configs/bytes_small.py
  llm-jax inspect --workdir=runs/bytes_small

Result: 2.603 bits per byte over the whole validation part, in 11 minutes on two cores of a 2.5 GHz Xeon (0.65 s a
step). The seed's recipe in PyTorch, benchmarks/torch_byte_patch.py, reaches 2.756 (after 300 steps: 2.998 and 3.229).
"""

from llm_jax.config import base

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def get_config():
  config = base('byte_patch')
  config.num_steps = 1000
  config.batch_tokens = 4 * 1024
  config.tokens_per_device = 4 * 1024
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.scan_unroll = 4
  config.data.path = URL
  config.data.sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
  config.data.split = 'tail'
  config.data.val_fraction = 0.1
  config.data.tokenizer = 'byte'
  config.data.seq_len = 1024
  config.data.mask_documents = False
  config.optim.learning_rate = 1e-3
  config.optim.warmup_cosine.warmup_steps = 100
  config.optim.clip_by_global_norm.max_norm = 0.5
  config.eval.every = 250
  config.eval.prompts = ('ROMEO:',)
  config.checkpoint.every = 500
  return config

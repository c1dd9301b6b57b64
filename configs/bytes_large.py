"""AGIFORMER's large model (see docs/seeds.md) on enwik8: 768 wide, 8 layers. For an accelerator.

  llm-jax train --config=configs/bytes_large.py

Not run yet: the data could not be downloaded where this was written.
"""

from llm_jax.config import base


def get_config():
  config = base('byte_patch')
  config.num_steps = 20_000
  config.batch_tokens = 32 * 2048
  config.tokens_per_device = 8 * 2048
  config.model.num_layers = 8
  config.model.embed_dim = 768
  config.model.num_heads = 12
  config.data.path = 'enwik8'
  config.data.split = 'tail'
  config.data.val_fraction = 0.05
  config.data.test_fraction = 0.05
  config.data.tokenizer = 'byte'
  config.data.seq_len = 2048
  config.data.mask_documents = False
  config.optim.learning_rate = 6e-4
  config.optim.warmup_cosine.warmup_steps = 400
  config.optim.clip_by_global_norm.max_norm = 0.5
  config.eval.every = 1000
  config.eval.max_tokens = 524_288
  config.eval.prompts = ('The history of ',)
  config.checkpoint.every = 1000
  return config

"""AGIFORMER's medium model (see docs/seeds.md) on enwik8: bytes in patches of 4, three thinking steps.

  llm-jax train --config=configs/enwik8_bytes.py

The authors report 2.2578 bits per character after these 5000 steps; their code measures it over the first 1,103 bytes
of the validation part (20 batches of 4 rows, each row one byte after the last). Not run here yet: the data (35 MB,
downloaded once) could not be reached where this was written.
"""

from llm_jax.config import base


def get_config():
  config = base('byte_patch')
  config.num_steps = 5000
  config.batch_tokens = 4 * 1024
  config.tokens_per_device = 4 * 1024
  config.model.mlp_dim = 3072  # with it the 50M parameters that the guide speaks of
  config.model.scan_unroll = 6
  config.data.path = 'enwik8'
  config.data.split = 'tail'
  config.data.val_fraction = 0.05
  config.data.test_fraction = 0.05
  config.data.tokenizer = 'byte'
  config.data.seq_len = 1024
  config.data.mask_documents = False
  config.optim.learning_rate = 3e-4
  config.optim.schedule = 'constant'
  config.optim.constant.warmup_steps = 100
  config.optim.clip_by_global_norm.max_norm = 0.5
  config.optim.adamw.weight_decay = 0.01
  config.eval.every = 200
  config.eval.max_tokens = 65_536
  config.eval.prompts = ('The history of ',)
  config.checkpoint.every = 1000
  return config

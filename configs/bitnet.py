"""BitNet b1.58: matrices of -1, 0 and 1, activations of 8 bits, at the size that configs/gpt_small.py has on CPUs.

  llm-jax train --config=configs/bitnet.py
  llm-jax sweep --config=configs/bitnet.py        # three sizes beside full precision
  llm-jax export --workdir=runs/bitnet --out=runs/bitnet_packed        # two bits a weight

Result: val/loss 4.719 after 400 steps (5 minutes on two cores of a 2.5 GHz Xeon); full precision reaches 4.722.
docs/seeds.md has the table of sizes.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 400
  config.batch_tokens = config.tokens_per_device = 2048
  config.model.num_layers = 4
  config.model.embed_dim = 192
  config.model.num_heads = 6
  config.model.scan_unroll = 4
  config.model.einsum = 'bitnet'
  config.model.init_std = 0.06  # with 0.02 the blocks' rounding drowns the embeddings: half a nat
  config.data.seq_len = 128
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 60
  config.optim.chain = ('clip_by_global_norm', 'adamw', 'bitnet_flips')
  config.optim.adamw.b2 = 0.95
  config.optim.adamw.weight_decay = 0.1
  config.eval.every = 100
  config.eval.max_tokens = 16_384
  config.eval.prompts = ('import ', 'def __init__(self')
  config.eval.top_k = 40
  config.checkpoint.every = 200
  return config


def sweep():
  """Three sizes, each beside full precision with the same data, steps and rates."""
  sizes = [(2, 96, 3), (4, 192, 6), (6, 288, 9)]
  return [{'model.num_layers': layers, 'model.scan_unroll': layers, 'model.embed_dim': width, 'model.num_heads': heads,
           'model.einsum': einsum, 'optim.chain': f'clip_by_global_norm,adamw{flips}'} for layers, width, heads in sizes
          for einsum, flips in (('full', ''), ('bitnet', ',bitnet_flips'))]

"""How complex is this function? Regression of log2 of McCabe's number of code that is only read.

  python configs/data/make_functions.py
  python -m llm_jax.main --config=configs/complexity.py
  python -m llm_jax.evaluate --workdir=runs/complexity --checkpoint=best

RESULT
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 400
  config.batch_tokens = 32 * 192
  config.tokens_per_device = 32 * 192
  config.model.num_layers = 2
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.positions = 'rope'
  config.model.norm = 'rms_norm'
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 384
  config.model.dropout = 0.2
  config.model.scan_unroll = 2
  config.data.path = 'configs/data/functions.jsonl'
  config.data.field = 'code'
  config.data.label_field = 'complexity'
  config.data.task = 'regression'
  config.data.packing = 'pad'
  config.data.val_fraction = 0.1
  config.data.vocab_size = 2048
  config.data.seq_len = 192
  config.loss.terms = ('regression',)
  config.loss.regression.pooling = 'mean'
  config.optim.learning_rate = 2e-3
  config.optim.warmup_cosine.warmup_steps = 40
  config.eval.every = 100
  config.checkpoint.every = 200
  return config

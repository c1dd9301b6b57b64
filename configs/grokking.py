"""Grokking: division modulo 97 is learnt by heart at once and understood much later, unless Grokfast helps.

  python configs/data/make_modular.py
  python -m llm_jax.main --config=configs/grokking.py
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 1500
  config.batch_tokens = config.tokens_per_device = 512 * 5
  config.model.num_layers = 2
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.scan_unroll = 2
  config.model.attention = 'xla'  # rows of 5 tokens have no blocks to save
  config.data.path = 'configs/data/modular.jsonl'
  config.data.label_field = 'quotient'
  config.data.task = 'classification'
  config.data.packing = 'pad'
  config.data.tokenizer = 'word'
  config.data.pattern = r'\d+|/'  # a number is one word
  config.data.val_fraction = 0.5
  config.data.seq_len = 5  # bos, a, /, b, eos
  config.loss.terms = ('classification',)
  config.optim.learning_rate = 1e-3
  config.optim.schedule = 'constant'
  config.optim.constant.warmup_steps = 10
  config.optim.chain = ('grokfast_ema', 'l2', 'adam')
  config.optim.grokfast_ema.alpha = 0.98
  config.optim.grokfast_ema.lamb = 2.0
  config.optim.adam.b1 = 0.9
  config.optim.adam.b2 = 0.98
  config.optim.l2.weight_decay = 0.01
  config.eval.every = 50
  config.eval.capabilities = ('val/accuracy >= 0.5', 'val/accuracy >= 0.95')
  config.eval.monitor = 'val/accuracy'
  config.eval.mode = 'max'
  config.checkpoint.every = 1000
  config.checkpoint.keep_best = 0
  return config

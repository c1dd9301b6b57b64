"""How long is '2 hours and 5 minutes'? Regression of the logarithm of a duration, as people write it.

  python configs/data/make_durations.py
  llm-jax train --config=configs/duration.py
  llm-jax predict --workdir=runs/duration --text='2 hours and 5 minutes' --text=1:30:00

Result: r2 0.999, mean error 0.031 (7%) on 622 unseen durations, after 1 min 22 s on two busy cores of a 2.5 GHz Xeon.
Ridge regression over counts of bytes: r2 0.852, error 0.336; a line through the length: r2 0.046 (python -m
benchmarks.baselines).
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 1000
  config.batch_tokens = 32 * 40
  config.tokens_per_device = 32 * 40
  config.model.num_layers = 2
  config.model.embed_dim = 96
  config.model.num_heads = 4
  config.model.norm = 'rms_norm'
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 256
  config.model.scan_unroll = 2
  config.data.path = 'configs/data/durations.jsonl'
  config.data.label_field = 'log10_seconds'
  config.data.task = 'regression'
  config.data.packing = 'pad'
  config.data.tokenizer = 'byte'
  config.data.val_fraction = 0.1
  config.data.seq_len = 40
  config.loss.terms = ('regression',)
  config.optim.learning_rate = 2e-3
  config.optim.warmup_cosine.warmup_steps = 50
  config.eval.every = 250
  config.checkpoint.every = 500
  return config

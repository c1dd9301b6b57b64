"""Which package of the standard library is this function from? A classifier of code, 22 classes.

  python configs/data/make_functions.py
  llm-jax train --config=configs/package.py
  llm-jax evaluate --workdir=runs/package --checkpoint=best
  llm-jax predict --workdir=runs/package --text="$(cat my_function.py)"

Result: 84.9% of 597 unseen functions (97.5% among the five most likely, macro F1 0.820), in 7 minutes on two cores of
a 2.5 GHz Xeon. Naive Bayes over the same tokens: 82.7%, macro F1 0.824; always the most common class: 16.4% (python
-m benchmarks.baselines). After 400 steps: 82.8% with next-token prediction beside it, 82.2% without.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 800
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
  config.data.label_field = 'package'
  config.data.task = 'classification'
  config.data.packing = 'pad'
  config.data.val_fraction = 0.1
  config.data.vocab_size = 2048
  config.data.seq_len = 192
  config.data.augment.token_dropout = 0.1
  config.loss.terms = ('classification', 'next_token')
  config.loss.next_token.weight = 0.5
  config.loss.classification.pooling = 'mean'
  config.optim.learning_rate = 2e-3
  config.optim.warmup_cosine.warmup_steps = 40
  config.eval.every = 200
  config.eval.sample_tokens = 0
  config.checkpoint.every = 400
  return config

"""Which function does this summary describe? Embeddings of code and words, for search; learnt from pairs.

  python configs/data/make_functions.py
  python -m llm_jax.main --config=configs/search.py
  python -m llm_jax.evaluate --workdir=runs/search --checkpoint=best

RESULT
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 400
  config.batch_tokens = 64 * 128
  config.tokens_per_device = 64 * 128  # all rows at once: they are each other's wrong answers
  config.model.num_layers = 2
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.positions = 'rope'
  config.model.norm = 'rms_norm'
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 384
  config.model.dropout = 0.2
  config.model.scan_unroll = 2
  config.data.path = 'configs/data/documented.jsonl'
  config.data.field = 'summary'
  config.data.answer_field = 'code'
  config.data.task = 'pairs'
  config.data.packing = 'pad'
  config.data.truncate = 'right'
  config.data.val_fraction = 0.1
  config.data.vocab_size = 2048
  config.data.seq_len = 128
  config.data.encoder_len = 128
  config.loss.terms = ('contrastive',)
  config.optim.learning_rate = 2e-3
  config.optim.warmup_cosine.warmup_steps = 40
  config.eval.every = 100
  config.checkpoint.every = 200
  return config

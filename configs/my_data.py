"""A small model on data of your own, which you name on the command line.

  llm-jax train --config=configs/my_data.py --config.data.path='notes/**/*.md'
  llm-jax train --config=configs/my_data.py --config.data.path=pairs.jsonl --config.data.task=prompt_answer \
      --config.data.packing=best_fit

docs/data.md has a line for each format. Look before you train, with the same flags:

  llm-jax data inspect --config=configs/my_data.py --config.data.path='notes/**/*.md' --out=data.png

Without a path it does not run. Each data set needs a folder of its own, such as --workdir=runs/pairs. The model has
Llama's parts (RoPE, RMSNorm, SwiGLU) in 30 M parameters, on CPUs in 2.5 M (see on_cpu). Neither size has been trained
to its end yet: the result depends on your data.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 2000
  config.batch_tokens = 65_536
  config.tokens_per_device = 16_384
  config.model.num_layers = 8
  config.model.embed_dim = 512
  config.model.num_heads = 8
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 1408
  config.model.norm = 'rms_norm'
  config.model.positions = 'rope'
  config.model.scan_unroll = 8
  config.data.path = ''  # set it on the command line, or in your copy of this file
  config.data.seq_len = 512
  config.data.tokenizer = 'bpe'
  config.data.vocab_size = 8192
  config.data.filters.deduplicate = True
  config.data.filters.deduplicate_normalized = True
  config.optim.learning_rate = 1e-3
  config.optim.warmup_cosine.warmup_steps = 100
  config.optim.adamw.b2 = 0.95
  config.optim.adamw.weight_decay = 0.1
  config.eval.max_tokens = 131_072
  config.eval.top_k = 40
  return config


def on_cpu(config):
  """For two cores."""
  config.num_steps = 500
  config.batch_tokens = 2_048
  config.tokens_per_device = 2_048
  config.model.num_layers = 4
  config.model.embed_dim = 160
  config.model.num_heads = 5
  config.model.mlp_dim = 432
  config.model.scan_unroll = 4
  config.data.seq_len = 128
  config.data.encoder_len = 128
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 50
  config.eval.every = 100
  config.eval.max_tokens = 16_384
  config.checkpoint.every = 100

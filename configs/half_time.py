"""Half the time: what reaches plain AdamW's last loss on the default corpus in half of its time, and by which part?

  llm-jax sweep --config=configs/half_time.py --workdir=runs/half_time
  python -m benchmarks.half_time --workdir=runs/half_time

Result: Muon with a stable, then falling rate ends at 4.479, 4.503, 4.478 after 175 steps, AdamW at 4.519, 4.785,
4.716 after 400. It takes 0.35 to 0.48 of the time on two cores of a 2.5 GHz Xeon. All figures are in docs/seeds.md.
"""

from llm_jax.config import base

ADAMW = {'optim.chain': 'clip_by_global_norm,adamw', 'optim.learning_rate': 3e-3}
MUON = {'optim.chain': 'clip_by_global_norm,muon', 'optim.learning_rate': 1.2e-2}
SHORT = {'num_steps': 175}
WSD = {'optim.schedule': 'wsd', 'optim.wsd.warmup_steps': 5, 'optim.wsd.decay_steps': 110, 'optim.wsd.shape': 'linear'}


def get_config():
  config = base()
  config.num_steps = 400
  config.batch_tokens = config.tokens_per_device = 2048
  config.model.num_layers = 2
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.positions = 'rope'
  config.model.norm = 'rms_norm'
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 384
  config.model.scan_unroll = 2
  config.data.seq_len = 128
  config.data.vocab_size = 4096
  config.optim.warmup_cosine.warmup_steps = 20
  config.optim.warmup_cosine.end_factor = 0.0
  config.eval.every = 1000  # at the end
  config.eval.max_tokens = 32_768
  config.eval.sample_tokens = 0
  config.checkpoint.every = 1000
  config.checkpoint.keep_best = 0
  return config


def sweep():
  """Plain AdamW first; then less than half as many steps, with one part more in each."""
  recipes = [ADAMW, ADAMW | SHORT, MUON | SHORT, MUON | SHORT | WSD]
  return [{**recipe, 'seed': seed} for seed in range(3) for recipe in recipes]

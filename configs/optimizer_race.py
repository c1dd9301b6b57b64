"""Which optimizer learns the default corpus fastest? All have the same budget, and four learning rates each.

  llm-jax sweep --config=configs/optimizer_race.py --workdir=runs/race
  python -m benchmarks.race --workdir=runs/race

Result: soap_muon reaches AdamW's last loss after 0.36 of its steps, Muon after 0.42. The tables are in docs/seeds.md.
Each of the 64 trials takes a minute on one core of a 2.5 GHz Xeon.
"""

from llm_jax.config import base

# Chains behind clip_by_global_norm, each at four learning rates around what their authors advise beside AdamW's.
RATES = {
    'adamw': (1e-3, 3e-3, 6e-3, 1.2e-2),
    'muon': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'normuon': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'soap': (1e-3, 3e-3, 6e-3, 1.2e-2),
    'soap_muon': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'muon,cautious_decay': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'muon,update_floor': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'muon,tail_ema': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'soap_muon,update_floor,cautious_decay,tail_ema': (6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    'ademamix': (1e-3, 3e-3, 6e-3, 1.2e-2),
    'schedule_free': (1e-3, 3e-3, 6e-3, 1.2e-2),
    'lion': (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    'adafactor': (1e-2, 3e-2, 1e-1, 3e-1),
    'prodigy': (0.5, 1.0, 2.0, 4.0),
    'sgd': (0.03, 0.1, 0.3, 1.0),
    'grokfast_ema,adamw': (1e-3, 3e-3, 6e-3, 1.2e-2),
}

# Settings by link. The tail is the last quarter of the steps.
WITH = {
    'schedule_free': {'optim.schedule': 'constant', 'optim.constant.warmup_steps': 20},  # averages instead of decaying
    'cautious_decay': {'optim.cautious_decay.weight_decay': 0.025},
    'update_floor': {'optim.update_floor.ratio': 0.3825, 'optim.update_floor.per': 'output'},
    'tail_ema': {'optim.tail_ema.start': 150},
}


def get_config():
  config = base()
  config.num_steps = 200
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
  config.eval.every = 20
  config.eval.max_tokens = 32_768
  config.eval.sample_tokens = 0
  config.checkpoint.every = 200
  config.checkpoint.keep_best = 0
  return config


def sweep():
  trials = []
  for chain, rates in RATES.items():
    links = chain.split(',')
    settings = {name: value for link in links for name, value in WITH.get(link, {}).items()}
    if {'cautious_decay', 'update_floor'} & set(links):  # which take the place of the optimizer's own decay
      settings[f'optim.{links[0]}.weight_decay'] = 0.0
    trials += [{'optim.chain': f'clip_by_global_norm,{chain}', 'optim.learning_rate': rate, **settings}
               for rate in rates]
  return trials

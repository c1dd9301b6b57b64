"""Chat: questions about Python's standard library and their answers, in conversations of one to three turns.

  python configs/data/make_chats.py
  llm-jax train --config=configs/chat_small.py
  llm-jax generate --workdir=runs/chat_small --temperature=0 --prompt='What does os.path.join do?'
  llm-jax chat --workdir=runs/chat_small --temperature=0

Result: TODO
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 700
  config.batch_tokens = 16 * 128
  config.tokens_per_device = 16 * 128
  config.model.num_layers = 3
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.positions = 'rope'
  config.model.norm = 'rms_norm'
  config.model.mlp = 'swiglu'
  config.model.mlp_dim = 384
  config.model.scan_unroll = 3
  config.data.path = 'configs/data/chats.jsonl'
  config.data.val_path = 'configs/data/chats_val.jsonl'
  config.data.task = 'chat'
  config.data.chat.template = 'chatml'
  config.data.packing = 'best_fit'
  config.data.seq_len = 128
  config.data.tokenizer = 'bpe'
  config.data.vocab_size = 2048
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 50
  config.optim.adamw.b2 = 0.98
  config.optim.adamw.weight_decay = 0.1
  config.eval.every = 100
  config.eval.prompts = ('What does os.path.join do?', 'Which module is it in?')
  config.eval.sample_tokens = 48
  config.eval.temperature = 0.0
  config.checkpoint.every = 400
  return config

"""Chat: questions about Python's standard library and their answers, in conversations of one to three turns.

  python configs/data/make_chats.py
  llm-jax train --config=configs/chat_small.py
  llm-jax generate --workdir=runs/chat_small --temperature=0 --prompt='What does textwrap.dedent do?'
  llm-jax chat --workdir=runs/chat_small --temperature=0

Result: of 106 answers in 60 conversations that it was trained on, 95 are given word for word (36 of 45 descriptions, 41
of 43 signatures, all 18 modules). On names that it has not seen it finds the module, which it must copy from the first
question, in 17 of 22 answers, and hardly any description (0 of 46) or signature (2 of 46): these it can only guess, so
val/loss is lowest, 3.30, at step 600; val/accuracy rises to 0.467 at the end. 0.9 M parameters, in 20 minutes on two
cores that were shared with other programs.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 1400
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
  config.eval.every = 200
  config.eval.prompts = ('What does textwrap.dedent do?', 'How do I call shutil.copytree?')
  config.eval.sample_tokens = 48
  config.eval.temperature = 0.0
  config.checkpoint.every = 400
  return config

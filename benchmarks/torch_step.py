"""The training step of benchmarks/step.py in PyTorch, as its users write it, for comparison.

  /path/to/an/environment/with/torch/bin/python -m benchmarks.torch_step --preset=char_small

Fused AdamW, scaled_dot_product_attention, float32 weights; --dtype=bf16 is autocast, --compile is torch.compile. With
--documents attention is flex_attention, whose block mask is made outside of the timed step.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.common import GEMM_SIZE, PRESETS, Preset, parser, run, segments


class Block(nn.Module):
  """Pre-norm attention and feed-forward, without biases."""

  def __init__(self, dim: int, num_heads: int, gelu: str):
    super().__init__()
    self.num_heads, self.gelu = num_heads, gelu
    self.attn_norm, self.mlp_norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
    self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
    self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

  def forward(self, x_BTD, mask):
    heads = self.qkv(self.attn_norm(x_BTD)).unflatten(-1, (3, self.num_heads, -1))
    q_BNTH, k_BNTH, v_BNTH = heads.permute(2, 0, 3, 1, 4)
    if mask is None:
      y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    else:
      y_BNTH = flex_attention(q_BNTH, k_BNTH, v_BNTH, block_mask=mask)
    x_BTD = x_BTD + self.out(y_BNTH.transpose(1, 2).flatten(2))
    return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD)), approximate=self.gelu))


class GPT(nn.Module):
  """Tokens and targets [B, T] -> mean cross-entropy."""

  def __init__(self, preset: Preset, gelu: str = 'tanh'):
    super().__init__()
    self.tokens = nn.Embedding(preset.vocab_size, preset.embed_dim)
    self.positions = nn.Embedding(preset.seq_len, preset.embed_dim)
    self.blocks = nn.ModuleList(Block(preset.embed_dim, preset.num_heads, gelu) for _ in range(preset.num_layers))
    self.norm = nn.LayerNorm(preset.embed_dim, bias=False)
    for name, w in self.named_parameters():
      if w.ndim == 2:
        residual = name.endswith(('out.weight', 'down.weight'))
        nn.init.normal_(w, std=0.02 / math.sqrt(2 * preset.num_layers) if residual else 0.02)

  def forward(self, tokens_BT, targets_BT, positions_BT, mask):
    positions = self.positions.weight[:tokens_BT.shape[1]] if positions_BT is None else self.positions(positions_BT)
    x_BTD = self.tokens(tokens_BT) + positions
    for block in self.blocks:
      x_BTD = block(x_BTD, mask)
    logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def main():
  flags = parser(__doc__)
  flags.add_argument('--device', default='cpu')
  flags.add_argument('--dtype', choices=['f32', 'bf16'], default='f32')
  flags.add_argument('--compile', action='store_true')
  args = flags.parse_args()
  preset, device = PRESETS[args.preset], args.device
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('highest' if device == 'cpu' else 'high')
  model = GPT(preset).to(device)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
  loss_fn = torch.compile(model) if args.compile else model
  batch = args.batch or preset.batch
  ids_BT = torch.tensor(segments(batch, preset.seq_len, args.documents), device=device)

  def visible(b, _, q, k):
    return (q >= k) & (ids_BT[b, q] == ids_BT[b, k])

  mask = positions_BT = None
  if args.documents:
    earlier_BT = (ids_BT[:, None, :] < ids_BT[:, :, None]).sum(2)  # tokens of the documents before
    positions_BT = torch.arange(preset.seq_len, device=device) - earlier_BT
    mask = create_block_mask(visible, batch, None, preset.seq_len, preset.seq_len, device)
  rows = torch.randint(preset.vocab_size, (8, batch, preset.seq_len + 1), device=device)
  batches, count = [(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows], 0

  def step() -> float:
    nonlocal count
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == 'bf16'):
      loss = loss_fn(*batches[count % 8], positions_BT, mask)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    count += 1
    return loss.item()  # waits

  square = torch.ones(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16 if args.dtype == 'bf16' else None)

  def gemm() -> None:
    (square @ square)[0, 0].item()

  name = torch.cuda.get_device_name() if device == 'cuda' else device
  num_params = sum(w.numel() for w in model.parameters()) - model.positions.weight.numel()
  about = {'framework': f'torch {torch.__version__}', 'device': name, 'compile': args.compile, 'dtype': args.dtype}
  if device == 'cuda':
    step()
    about['gb_needed'] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
  run(args, about, num_params, step, gemm)


if __name__ == '__main__':
  main()

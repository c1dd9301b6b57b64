"""AGIFORMER's small model in PyTorch, trained as by its authors, for comparison with configs/bytes_small.py.

  /path/to/an/environment/with/torch/bin/python -m benchmarks.torch_byte_patch --data=input.txt

It computes the same as the PyTorch version of github.com/inkbytefo/agi-former (November 2025); see docs/seeds.md. As in
the original: PyTorch's initial weights, biases everywhere, LayerNorm, dropout 0.1, rotation of the patches themselves
instead of queries and keys, a local state that starts at zero and receives the latent with each byte, and AdamW with
weight decay 0.01 on all parameters. The original is causal, to the byte.
Differences: the feed-forward of a block is 5 times as wide as the model instead of 4, for 6.71M parameters (ours:
6.77M). A row predicts 256 patches instead of 255. Validation uses all whole rows and predicts the same bytes as ours;
the original uses 80 rows that begin one byte apart, 1.1 kB of text. Windows use scaled_dot_product_attention. Linear
attention is the original's cumulative sum, 67 MB per layer; --linear=masked computes the same by masked products,
faster.
Dims: B rows, M patches, P bytes of a patch, T bytes, D embed, E local embed, N heads, H head_dim, I that of the values,
V vocab.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import GEMM_SIZE, serve

P, T, ROWS, WINDOW, LOCAL_DIM, WARMUP = 4, 1024, 4, 128, 256, 100
EPSILON = 1e-4  # of the original, where features and normalizers could be zero


def feature(x: torch.Tensor) -> torch.Tensor:
  return F.elu(x) + (1 + EPSILON)


def cumulative(q_BNMH: torch.Tensor, k_BNMH: torch.Tensor, v_BNMI: torch.Tensor) -> torch.Tensor:
  """Linear attention by the states after all patches at once."""
  states_BNMHI = torch.einsum('bnmh,bnmi->bnmhi', k_BNMH, v_BNMI).cumsum(2)
  norm_BNM = torch.einsum('bnmh,bnmh->bnm', q_BNMH, k_BNMH.cumsum(2))
  return torch.einsum('bnmh,bnmhi->bnmi', q_BNMH, states_BNMHI) / (norm_BNM[..., None] + EPSILON)


def masked(q_BNMH: torch.Tensor, k_BNMH: torch.Tensor, v_BNMI: torch.Tensor) -> torch.Tensor:
  """The same as attention without a softmax."""
  w_BNMM = (q_BNMH @ k_BNMH.mT).tril()
  return w_BNMM @ v_BNMI / (w_BNMM.sum(-1, keepdim=True) + EPSILON)


LINEAR = {'cumulative': cumulative, 'masked': masked}


def feed_forward(dim: int, inner: int, dropout: float) -> nn.Sequential:
  return nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim), nn.Dropout(dropout))


class HybridBlock(nn.Module):
  """Pre-norm attention, by window and linear side by side, joined by one more matrix; then feed-forward."""

  def __init__(self, dim: int, num_heads: int, dropout: float, linear: str):
    super().__init__()
    self.num_heads, self.linear = num_heads, LINEAR[linear]
    self.attn_norm, self.far_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
    self.near_qkv, self.far_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
    self.near_out, self.far_out, self.joined = (nn.Linear(dim, dim) for _ in range(3))
    self.dropout = nn.Dropout(dropout)
    self.mlp = feed_forward(dim, 5 * dim, dropout)

  def heads(self, qkv_BMX: torch.Tensor) -> torch.Tensor:
    """[3, B, N, M, H]"""
    return qkv_BMX.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

  def forward(self, x_BMD: torch.Tensor, window_MM: torch.Tensor) -> torch.Tensor:
    h_BMD = self.attn_norm(x_BMD)
    near_BNMH = F.scaled_dot_product_attention(*self.heads(self.near_qkv(h_BMD)), attn_mask=window_MM)
    near_BMD = self.near_out(near_BNMH.transpose(1, 2).flatten(2))
    q_BNMH, k_BNMH, v_BNMH = self.heads(self.far_qkv(h_BMD))
    far_BNMH = self.linear(feature(q_BNMH) * q_BNMH.shape[-1] ** -0.5, feature(k_BNMH), v_BNMH)
    far_BMD = self.dropout(self.far_norm(self.far_out(far_BNMH.transpose(1, 2).flatten(2))))
    x_BMD = x_BMD + self.joined(near_BMD + far_BMD)
    return x_BMD + self.mlp(self.mlp_norm(x_BMD))


def rotate(x_BMD: torch.Tensor) -> torch.Tensor:
  """Rotates each patch's embedding by its position, dimension d with d + D/2."""
  M, D = x_BMD.shape[1:]
  rates = 10000 ** (-torch.arange(0, D, 2, device=x_BMD.device) / D)
  angles = torch.arange(M, device=x_BMD.device)[:, None] * rates
  a, b = x_BMD.chunk(2, dim=-1)
  return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class BytePatch(nn.Module):
  """Bytes [B, P + T] -> mean cross-entropy of the last T, each predicted from the patches up to its own."""

  def __init__(self, dim: int = 256, num_layers: int = 4, num_heads: int = 4, thinking_steps: int = 3,
               dropout: float = 0.1, linear: str = 'cumulative'):
    super().__init__()
    self.thinking_steps, self.dropout = thinking_steps, nn.Dropout(dropout)
    self.embed, self.patch = nn.Embedding(256, dim), nn.Linear(P * dim, dim)  # `patch` is the strided Conv1d
    self.patch_norm, self.latent_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
    self.blocks = nn.ModuleList(HybridBlock(dim, num_heads, dropout, linear) for _ in range(num_layers))
    if thinking_steps:
      self.think_norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, dim)
      self.think = feed_forward(dim, 4 * dim, dropout)
    self.context, self.local_embed = nn.Linear(dim, LOCAL_DIM), nn.Embedding(256, LOCAL_DIM)
    self.gru = nn.GRU(2 * LOCAL_DIM, LOCAL_DIM, batch_first=True)
    self.head = nn.Linear(LOCAL_DIM, 256)

  def latents(self, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The latents after each patch [B, M, D]."""
    x_BMD = self.patch(self.embed(tokens_BT).unflatten(1, (-1, P)).flatten(2))
    x_BMD = self.dropout(self.patch_norm(rotate(x_BMD)))
    M = x_BMD.shape[1]
    window_MM = torch.ones(M, M, dtype=torch.bool, device=x_BMD.device).tril().triu(1 - WINDOW)
    for block in self.blocks:
      x_BMD = block(x_BMD, window_MM)
    z_BMD = self.latent_norm(x_BMD)
    for _ in range(self.thinking_steps):
      h_BMD = self.think_norm(z_BMD)
      z_BMD = z_BMD + torch.sigmoid(self.gate(h_BMD)) * self.think(h_BMD)
    return z_BMD

  def logits(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V]. Targets are the tokens P later; the last of a patch is not used."""
    context_BM1E = self.context(self.latents(tokens_BT))[:, :, None]
    read_BMP = F.pad(targets_BT.unflatten(1, (-1, P))[..., :-1], (1, 0))  # the original also begins with byte 0
    x_BMPX = torch.cat([self.local_embed(read_BMP), context_BM1E.expand(-1, -1, P, -1)], dim=-1)
    h_BTE = self.gru(x_BMPX.flatten(0, 1))[0].reshape(*targets_BT.shape, -1)
    return self.head(h_BTE)

  def forward(self, bytes_BX: torch.Tensor) -> torch.Tensor:
    tokens_BT, targets_BT = bytes_BX[:, :-P], bytes_BX[:, P:]
    return F.cross_entropy(self.logits(tokens_BT, targets_BT).flatten(0, 1), targets_BT.flatten())


def learning_rate(step: int, peak: float, schedule: str, num_steps: int) -> float:
  """The learning rate of step 0, 1, ...: the original's, or that of llm_jax's WarmupCosine."""
  if schedule == 'constant':
    return peak * min(1, (step + 1) / WARMUP)
  if step < WARMUP:
    return peak * (step + 1) / (WARMUP + 1)
  return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (num_steps - WARMUP))))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', help='a file, of which all bytes are used (default with --serve: random bytes)')
  numbers = {'steps': 1000, 'every': 250, 'embed_dim': 256, 'num_layers': 4, 'num_heads': 4, 'thinking_steps': 3,
             'dropout': 0.1, 'learning_rate': 3e-4, 'val_fraction': 0.1, 'seed': 0, 'threads': 0}
  for name, value in numbers.items():
    parser.add_argument(f'--{name}', type=type(value), default=value)
  parser.add_argument('--linear', choices=LINEAR, default='cumulative')
  parser.add_argument('--schedule', choices=['constant', 'cosine'], default='constant', help='after 100 warm-up steps')
  parser.add_argument('--compile', action='store_true')
  parser.add_argument('--serve', action='store_true', help='time steps on demand: see common.serve')
  args = parser.parse_args()
  if not (args.data or args.serve):
    parser.error('--data is needed, except with --serve')
  torch.manual_seed(args.seed)
  if args.threads:  # default: PyTorch's choice
    torch.set_num_threads(args.threads)
  content = torch.randint(256, (1 << 20,))
  if args.data:
    content = torch.frombuffer(bytearray(Path(args.data).read_bytes()), dtype=torch.uint8).long()
  num_train = int(round(len(content) * (1 - args.val_fraction), 6))
  train = content[:num_train]
  # It predicts a byte after at least P others, ours after one: rows begin earlier, so that both predict the same bytes.
  val = [content[i - P + 1:i + T + 1] for i in range(num_train, len(content) - T, T)]
  model = BytePatch(args.embed_dim, args.num_layers, args.num_heads, args.thinking_steps, args.dropout, args.linear)
  optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
  loss_fn = torch.compile(model) if args.compile else model
  about = {'framework': f'torch {torch.__version__}', 'compile': args.compile, 'linear': args.linear,
           'params': sum(w.numel() for w in model.parameters())}
  losses: list[float] = []

  def step() -> float:
    for group in optimizer.param_groups:
      group['lr'] = learning_rate(len(losses), args.learning_rate, args.schedule, args.steps)
    rows = [train[i:i + T + P] for i in torch.randint(len(train) - T - P + 1, (ROWS,))]
    loss = loss_fn(torch.stack(rows))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    return losses[-1]

  @torch.no_grad()
  def validate() -> float:
    """Bits per byte."""
    model.eval()
    batches = [torch.stack(val[i:i + ROWS]) for i in range(0, len(val), ROWS)]
    nats = sum(model(x).item() * len(x) for x in batches) / len(val)
    model.train()
    return nats / math.log(2)

  if args.serve:
    square, start = torch.ones(GEMM_SIZE, GEMM_SIZE), time.perf_counter()
    step()
    about |= {'first_step_s': round(time.perf_counter() - start, 2), 'tokens': ROWS * T}
    serve(about, step, lambda: (square @ square)[0, 0].item())
    return
  print(f'{about["params"]:,} parameters, {len(train):,} bytes to train on, {len(val)} rows to validate', flush=True)
  seconds: list[float] = []
  bits = math.nan
  for n in range(1, args.steps + 1):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
    if n % args.every == 0 or n == args.steps:
      bits = validate()
      print(f'step {n}: train/loss {statistics.fmean(losses[-10:]):.4f} over 10 steps, val/bits_per_byte {bits:.4f}, '
            f'{sum(seconds):.1f} s of training, {1e3 * statistics.median(seconds):.1f} ms a step', flush=True)
  print(json.dumps(vars(args) | about | {
      'bits_per_byte': round(bits, 4), 'train_s': round(sum(seconds), 1),
      'step_ms': round(1e3 * statistics.median(seconds), 1)}), flush=True)


if __name__ == '__main__':
  main()

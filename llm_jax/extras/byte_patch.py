"""A byte model on patches: a hybrid stack over patches, thinking steps on their latents, a decoder inside each patch.

After AGIFORMER (github.com/inkbytefo/agi-former) and MEGABYTE (arXiv 2305.07185). A patch of P bytes is one position
of the stack, whose blocks combine sliding-window attention and linear attention. Thinking steps with shared weights
refine the latent of a patch; from it a small decoder predicts the next patch, byte by byte. The byte at position u of
a row, u = 1 ..., is predicted from the patches that end before u and from the bytes between the last of them and u.
Dims: B batch, T bytes, M patches, P bytes in a patch, Q input bytes of a patch, E byte embedding, D embed,
N heads, H head_dim, W window, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.batch import Batch, Cache
from llm_jax.base.builder import Sections, known_names, sections
from llm_jax.base.registry import register
from llm_jax.base.sharding import constrain
from llm_jax.extras.byte_decoders import LOCAL
from llm_jax.extras.linear_attention import CHUNK, empty_state, linear_attention
from llm_jax.extras.thinking import Think
from llm_jax.layers.attention import Layer, MultiHead, causal_attention
from llm_jax.layers.embed import Embed
from llm_jax.layers.linear import weight
from llm_jax.layers.stack import apply_layers, apply_stack, init_stack, unstack
from llm_jax.losses.readout import Readout
from llm_jax.models.blocks import PARTS, OutputMatrix, make_einsum, make_heads, make_mlp, make_norm, make_readout
from llm_jax.models.decoder_config import StackConfig, require
from llm_jax.models.registry import MODELS


@dataclasses.dataclass(frozen=True)
class BytePatchConfig(StackConfig):
  """Shape and parts of a byte-patch model. The defaults are AGIFORMER's medium model, with 37M parameters here."""

  name: str = 'byte_patch'  # one of MODELS
  patch_size: int = 4  # bytes in a patch, one position of the stack
  overlap: bool = False  # a patch also reads the bytes of the patch before it
  num_layers: int = 6
  embed_dim: int = 512
  num_heads: int = 8
  mlp: str = 'swiglu'
  norm: str = 'rms_norm'
  window: int = 128  # patches that attention spans, including the current one
  thinking_steps: int = 3  # with shared weights; 0: none
  halting: bool = False  # adaptive number of steps per patch (arXiv 1603.08983), at most thinking_steps
  ponder_cost: float = 0.01  # loss in nats per step, with halting
  decoder: str = 'gru'  # the decoder inside a patch: one of LOCAL
  decoder_layers: int = 2  # for decoder transformer
  sections: Sections = sections(PARTS['mlp'], PARTS['norm'])

  def __post_init__(self):
    super().__post_init__()
    require(self, 'at least 1', lambda x: x >= 1, 'patch_size', 'window', 'decoder_layers')
    require(self, '0 or more', lambda x: x >= 0, 'thinking_steps', 'ponder_cost')
    if self.embed_dim % (2 * self.num_heads):
      raise ValueError(f'num_heads {self.num_heads} must divide embed_dim {self.embed_dim} into even parts')
    if self.embed_dim % self.patch_size:
      raise ValueError(f'patch_size {self.patch_size} does not divide embed_dim {self.embed_dim}')
    if self.halting and not self.thinking_steps:
      raise ValueError('halting needs thinking_steps, its maximum, to be at least 1; got 0')
    if self.decoder not in LOCAL:
      raise ValueError(f'decoder {self.decoder!r} is unknown; {known_names(self.decoder, LOCAL)}')

  @property
  def layers(self) -> tuple[Layer, ...]:
    return (super().layers[0]._replace(window=self.window),)

  @property
  def Q(self) -> int:
    return self.patch_size * (2 if self.overlap else 1)

  def positions_of(self, seq_len: int) -> int:
    return -(-seq_len // self.patch_size)

  def flops_per_token(self, seq_len: int) -> float:
    """As in DecoderConfig, per byte; work done once per patch is divided by patch_size."""
    D, P = self.embed_dim, self.patch_size
    feed_forward = D * self.F * (3 if self.mlp in ('swiglu', 'geglu') else 2)
    seen, patches = min(self.window, seq_len // P), seq_len // P
    attended = seen * (1 - seen / (2 * patches)) if patches else 0
    # Linear attention: reading and writing the state, and half of a chunk's weights.
    block = 6 * (8 * D * D + feed_forward) + 12 * attended * D + 12 * D * self.H + 6 * min(CHUNK, patches) * D
    think = 6 * self.thinking_steps * (feed_forward + D * D)
    patch = self.num_layers * block + think + 6 * self.Q * (D // P) * D
    return patch / P + LOCAL[self.decoder].flops_per_byte(self) + 6 * D * self.V


class Patches(NamedTuple):
  """The context of the blocks in a cached call: the number of real patches per row; None: one more patch per row."""

  num_real_B: jax.Array | None = None


class HybridBlock(nn.Module):
  """Pre-norm window attention and linear attention in parallel, then feed-forward, added to the residual stream."""

  cfg: BytePatchConfig

  @nn.compact
  def __call__(self, x_BMD, positions_BM, patches: Patches, cache, layer: Layer, train: bool):
    cfg = self.cfg
    norm, out_init = make_norm(cfg), nn.initializers.normal(cfg.init_std / (3 * cfg.num_layers) ** 0.5)
    dropout = nn.Dropout(cfg.dropout, deterministic=not train)
    h_BMD = norm(name='attn_norm')(x_BMD)
    near_BMD, near = make_heads(cfg, NearAttention, out_init, 'near')(h_BMD, positions_BM, patches, cache, layer)
    far_BMD, far = make_heads(cfg, FarAttention, out_init, 'far')(h_BMD, patches, cache)
    x_BMD = x_BMD + dropout(near_BMD) + dropout(far_BMD)
    mlp = make_mlp(cfg, out_init, name='mlp')
    x_BMD = x_BMD + dropout(mlp(norm(name='mlp_norm')(x_BMD)))
    return constrain(x_BMD, 'act_batch', 'act_length', 'act_embed'), cache and {**near, **far}


class NearAttention(MultiHead):
  """Attention over a window of patches. Slot s of its cache holds the latest patch whose index is s modulo W."""

  @nn.compact
  def __call__(self, x_BMD, positions_BM, patches: Patches, cache, layer: Layer):
    window = layer.window
    q_BMNH, k_BMNH = (self.project(name, x_BMD, positions_BM, layer.rope) for name in 'qk')
    v_BMNH = self.project('v', x_BMD)
    if cache is None or patches.num_real_B is not None:
      implementation = 'xla' if self.is_initializing() else self.implementation
      y_BMNH = causal_attention(q_BMNH, k_BMNH, v_BMNH, window=window, implementation=implementation)
      if patches.num_real_B is not None:
        cache = {'k': ring(k_BMNH, patches.num_real_B, window), 'v': ring(v_BMNH, patches.num_real_B, window)}
    else:
      write = jax.vmap(lambda slots, position, x: slots.at[position % window].set(x))
      cache = {name: write(cache[name], positions_BM[:, 0], x[:, 0]) for name, x in (('k', k_BMNH), ('v', v_BMNH))}
      filled_BW = (jnp.arange(window)[None] <= positions_BM) | (positions_BM >= window)
      y_BMNH = jax.nn.dot_product_attention(q_BMNH, cache['k'], cache['v'], mask=filled_BW[:, None, None])
    return self.output(checkpoint_name(y_BMNH, 'attention')), cache


class FarAttention(MultiHead):
  """Linear attention over all patches; the cache holds its state."""

  @nn.compact
  def __call__(self, x_BMD, patches: Patches, cache):
    q_BMNH, k_BMNH, v_BMNH = (self.project(name, x_BMD) for name in 'qkv')
    real_BM = None
    if patches.num_real_B is not None:
      real_BM = jnp.arange(k_BMNH.shape[1])[None] < patches.num_real_B[:, None]
    y_BMNH, state = linear_attention(q_BMNH, k_BMNH, v_BMNH, cache and {'s': cache['s'], 'z': cache['z']}, real_BM)
    return self.output(checkpoint_name(y_BMNH, 'attention')), state


def ring(x_BMNH: jax.Array, num_real_B: jax.Array, window: int) -> jax.Array:
  """Cache slots [B, W, N, H]: slot s holds a row's latest real patch with index s modulo W, or anything if none."""
  slots_BW = jnp.arange(window)[None]
  latest_BW = slots_BW + (num_real_B[:, None] - 1 - slots_BW) // window * window
  return jnp.take_along_axis(x_BMNH, jnp.clip(latest_BW, 0, x_BMNH.shape[1] - 1)[..., None, None], axis=1)


class BytePatch(nn.Module):
  """A LanguageModel (see models/protocol.py). A row is a single text: it does not read segments or positions."""

  cfg: BytePatchConfig
  reads = frozenset({'tokens', 'targets', 'loss_mask'})  # of a Batch
  needs: frozenset[str] = frozenset()
  prompt_in_row = True

  def setup(self):
    cfg = self.cfg
    init, D, P = nn.initializers.normal(cfg.init_std), cfg.embed_dim, cfg.patch_size
    self.embed = Embed(cfg.V, D // P, init)
    self.patch = make_einsum(cfg)(shape=(cfg.Q, D // P, D), axes=('patch', 'byte_embed', 'embed'),
                                  initializer=nn.initializers.normal(D ** -0.5))
    self.block = HybridBlock(cfg, parent=None)
    self.blocks = self.param('blocks', init_stack(self.block, cfg.num_layers, D, Patches()))
    self.latent_norm = make_norm(cfg)()
    self.think = Think(cfg)
    self.start = weight(self, 'start', init, (D,), ('embed',))
    self.local_embed = Embed(cfg.V, D, init)
    self.local = LOCAL[cfg.decoder](cfg)
    self.final_norm = make_norm(cfg)()
    self.head = OutputMatrix(cfg, cfg.init_std)
    self.dropout = nn.Dropout(cfg.dropout)

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    return self.readout(batch, train=train).logits()

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    P, (B, T) = self.cfg.patch_size, batch.tokens.shape
    tokens_BT = jnp.pad(batch.tokens, ((0, 0), (0, -T % P)))
    M = tokens_BT.shape[1] // P
    latents_BMD, _ = self.latents(tokens_BT, Patches(), None, train)
    contexts_BMD = jnp.concatenate([self._starts(B)[:, None], latents_BMD], axis=1)  # of patch 0 to M
    # The byte at u = 1 ... T is predicted in patch u // P, after the earlier bytes of that patch.
    none = self.cfg.V  # the input before the first byte of a patch: a row of zeros in the table
    ids_BMP = jnp.pad(tokens_BT.reshape(B, M, P), ((0, 0), (0, 1), (0, 0)), constant_values=none)[:, :, :-1]
    ids_BMP = jnp.pad(ids_BMP, ((0, 0), (0, 0), (1, 0)), constant_values=none)
    h_BMPD = self.local(contexts_BMD, jnp.pad(self.local_embed.w, ((0, 1), (0, 0))), ids_BMP, train)
    return self.output(h_BMPD.reshape(B, -1, h_BMPD.shape[-1])[:, 1:T + 1])

  def latents(self, tokens_BT, patches: Patches, cache, train: bool, positions_BM=None):
    """(latents after thinking [B, M, D], cache of the blocks)."""
    cfg, P = self.cfg, self.cfg.patch_size
    B, M = tokens_BT.shape[0], tokens_BT.shape[1] // P
    e_BMPE = self.embed.encode(tokens_BT).reshape(B, M, P, -1)
    if cfg.overlap:
      e_BMPE = jnp.concatenate([jnp.pad(e_BMPE, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1], e_BMPE], axis=2)
    return self._latents(e_BMPE, patches, cache, train, positions_BM)

  def _latents(self, e_BMQE, patches: Patches, cache, train: bool, positions_BM=None):
    cfg = self.cfg
    B, M = e_BMQE.shape[:2]
    if positions_BM is None:
      positions_BM = jnp.broadcast_to(jnp.arange(M), (B, M))
    x_BMD = self.patch('BTPE,PED->BTD', e_BMQE).astype(jnp.float32)
    x_BMD = constrain(x_BMD, 'act_batch', 'act_length', 'act_embed')
    dropout_key = self.make_rng('dropout') if train and cfg.dropout else None
    if cache is not None:
      x_BMD, cache = apply_layers(self.block, unstack(self.blocks, cfg.operand_dtype), x_BMD, positions_BM, patches,
                                  layers=cfg.layers, cache=cache)
      return self.think(self.latent_norm(x_BMD)), cache
    x_BMD, sown = apply_stack(
        self.block, self.blocks, x_BMD, positions_BM, patches, layers=cfg.layers, dropout_key=dropout_key,
        train=train, dtype=cfg.operand_dtype, unroll=cfg.scan_unroll, remat=cfg.remat)
    for collection, values in sown.items():
      self.sow(collection, 'blocks', values)
    return self.think(self.latent_norm(x_BMD)), None

  def output(self, x_BTD: jax.Array) -> Readout:
    return make_readout(self.cfg, self.final_norm(x_BTD), self.head)

  def _starts(self, batch_size: int) -> jax.Array:
    return jnp.broadcast_to(self.start, (batch_size, *self.start.shape))

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    """An empty cache; its size does not depend on `max_len`."""
    cfg, B = self.cfg, batch_size
    slots = jnp.zeros((B, cfg.window, cfg.num_heads, cfg.H), cfg.operand_dtype)
    layer = {'k': slots, 'v': slots, **empty_state(B, cfg.num_heads, cfg.H)}
    return {'layers': (layer,) * cfg.num_layers,
            'length_B': jnp.zeros(B, jnp.int32), 'recent_BQ': jnp.full((B, cfg.Q), -1, jnp.int32),
            'context_BD': jnp.zeros((B, cfg.embed_dim)), 'local': LOCAL[cfg.decoder].init_state(cfg, B)}

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    P, Q, (B, T) = self.cfg.patch_size, self.cfg.Q, tokens_BT.shape
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -T % P)))
    num_real_B = lengths_B // P
    latents_BMD, layers = self.latents(tokens_BT, Patches(num_real_B), cache['layers'], False)
    contexts_BMD = jnp.concatenate([self._starts(B)[:, None], latents_BMD], axis=1)
    context_BD = jnp.take_along_axis(contexts_BMD, num_real_B[:, None, None], axis=1)[:, 0]

    def byte(places_BX):  # -1 before the begin of the row
      ids = jnp.take_along_axis(tokens_BT, jnp.clip(places_BX, 0, tokens_BT.shape[1] - 1), axis=1)
      return jnp.where(places_BX >= 0, ids, -1)

    context_B1D = context_BD[:, None]
    h_B1D, local = self.local.step(self.local.begin(context_B1D), context_B1D, jnp.zeros_like(context_B1D))
    for j in range(1, P):  # the bytes of an incomplete patch
      read_B = j <= lengths_B % P
      next_step = self.local.step(local, context_B1D, self.local_embed.encode(byte(num_real_B[:, None] * P + j - 1)))
      h_B1D, local = where(read_B, next_step, (h_B1D, local))
    cache = {'layers': layers, 'length_B': lengths_B, 'context_BD': context_BD, 'local': local,
             'recent_BQ': byte(lengths_B[:, None] - Q + jnp.arange(Q)[None])}
    return self.output(h_B1D).logits()[:, 0], cache

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    P = self.cfg.patch_size
    length_B = cache['length_B'] + 1
    recent_BQ = jnp.concatenate([cache['recent_BQ'][:, 1:], tokens_B[:, None]], axis=1)
    complete_B = length_B % P == 0

    def one_patch_more(_):
      e_BQE = jnp.where(recent_BQ[..., None] >= 0, self.embed.encode(recent_BQ), 0.0)
      latents_B1D, layers = self._latents(e_BQE[:, None], Patches(), cache['layers'], False,
                                          positions_BM=(length_B // P - 1)[:, None])
      return where(complete_B, (latents_B1D[:, 0], layers), (cache['context_BD'], cache['layers']))

    # The stack only runs if at least one row has completed a patch.
    context_BD, layers = jax.lax.cond(complete_B.any(), one_patch_more,
                                      lambda _: (cache['context_BD'], cache['layers']), None)
    local = where(complete_B, self.local.begin(context_BD[:, None]), cache['local'])
    e_B1D = jnp.where(complete_B[:, None, None], 0.0, self.local_embed.encode(tokens_B[:, None]))
    h_B1D, local = self.local.step(local, context_BD[:, None], e_B1D)
    cache = {'layers': layers, 'length_B': length_B, 'recent_BQ': recent_BQ, 'context_BD': context_BD, 'local': local}
    return self.output(h_B1D).logits()[:, 0], cache


def where(mask_B: jax.Array, new: Any, old: Any) -> Any:
  """jnp.where per row, for trees of arrays [B, ...]."""
  return jax.tree.map(lambda x, y: jnp.where(mask_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, old)


register(MODELS, 'byte_patch', BytePatch, BytePatchConfig)

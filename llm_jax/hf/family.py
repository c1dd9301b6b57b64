"""Families of published models: what each config says in ours, and which tensors hold which parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.base.builder import build, known_names, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import DTYPES
from llm_jax.base.registry import Registry
from llm_jax.hf.fields import Fields
from llm_jax.hf.rules import Rule
from llm_jax.hf.ternary import KINDS, as_packed, has_biases, read_quantization, ternary_rules, write_quantization
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import MODELS

SILU = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu'}  # gated
PLAIN = {'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu',
         'relu2': 'relu_squared'}


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type of transformers."""

  architecture: str  # the class with a language-model head
  read: Callable[[Fields], dict[str, Any]]  # the values of a model section of ours
  write: Callable[[Any], dict[str, Any]]  # the fields of config.json for our model's config
  rules: Callable[[Any], list[Rule]]  # for our model's config
  prefix: str = 'model.'  # of tensor names, absent in files of models without a head
  linear_class: str = 'bitlinear'  # of matrices that are written packed; see ternary.py


# Instances of Family by model_type.
FAMILIES = Registry('family')

# Fields of ours that do not change what a trained model computes, and those whose meaning is in others; see `meaning`.
_FREE = {'name', 'dropout', 'init_std', 'embed_init_std', 'readout_init_std', *DTYPES, 'scan_unroll', 'remat',
         'attention', 'vocab_multiple'}
_RESOLVED = {'use_bias', 'norm_bias', 'windows', 'rope_base', 'rope_bases', 'rope_scaling', 'rope_dim', 'positions'}


def read_model(values: Mapping[str, Any], where: str) -> tuple[Family, Any]:
  """(family, the config of our model) for a config.json. Raises ConfigError with the fields that stand in the way."""
  family = family_of(values, where)
  hf = Fields(values)
  try:
    model = read_quantization(hf, family.read(hf))
  except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as e:
    if hf.problems:
      hf.finish(where)
    raise ConfigError(f'{where}: a field has a value of the wrong kind: {type(e).__name__}: {str(e)[:200]}') from None
  hf.finish(where)
  try:
    cfg = build(MODELS.settings(model.get('name', 'decoder')), model, 'config.model')
    if model.get('einsum') == 'packed':
      inverse = values['quantization_config'].get('linear_class', 'bitlinear') == 'bitlinear'
      family = dataclasses.replace(family, rules=functools.partial(_packed, family.rules, inverse))
      family.rules(cfg)  # raises
      if not inverse and has_biases(cfg):
        raise ConfigError('quantization_config: autobitlinear with biases, which transformers multiplies by '
                          'weight_scale')
    return family, cfg
  except ConfigError as e:
    raise ConfigError(f'{where}: the model cannot be computed here: {e}') from None


def _packed(rules: Callable[[Any], list[Rule]], inverse: bool, cfg: Any) -> list[Any]:
  return ternary_rules(rules(cfg), inverse)


def family_of(values: Mapping[str, Any], where: str) -> Family:
  """Raises ConfigError for a model_type that no family has, and for quantized weights."""
  kind = str(values.get('model_type'))
  if isinstance(values.get('text_config'), dict):
    raise ConfigError(f'{where}: model_type {kind!r} reads more than text; save its text part alone: '
                      'AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)')
  if kind not in FAMILIES:
    raise ConfigError(f'{where}: model_type {kind!r} is no family that can be read; {known_names(kind, FAMILIES)}')
  quantized = values.get('quantization_config') or {}
  method = quantized.get('quant_method', 'bitnet') if isinstance(quantized, dict) else quantized
  if method != 'bitnet':
    raise ConfigError(f'{where}: quantization_config: the weights are quantized ({method}); use the model in bfloat16')
  return FAMILIES[kind]


def written(cfg: Any, model_type: str) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
  """(the fields of config.json in this family, {field of ours: (value, what the family makes of it)} that differ)."""
  family = FAMILIES[model_type]
  try:
    values = {'model_type': model_type, 'architectures': [family.architecture]} | family.write(cfg)
    values |= write_quantization(cfg, linear_class(cfg, family))
  except (AttributeError, TypeError, ValueError, LookupError) as e:  # the config of another kind of model
    return {}, {'name': (getattr(cfg, 'name', ''), f'decoder ({type(e).__name__})')}
  try:
    _, back = read_model(values, model_type)
  except ConfigError as e:
    return values, {'name': (cfg.name, f'another model: {e}')}
  mine, theirs = meaning(cfg), meaning(back)
  return values, {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}
                  if mine.get(name) != theirs.get(name)}


def meaning(cfg: Any) -> dict[str, Any]:
  """What a config computes, by field, with None replaced by what it means and patterns by what each layer has."""
  if type(cfg) is not DecoderConfig:
    return {'name': cfg.name} | {name: value for name, value in to_dict(cfg).items() if name not in _FREE}
  found = dict[str, Any]()
  for name, value in to_dict(cfg).items():
    if isinstance(value, dict):
      found |= {f'{name}.{field}': entry for field, entry in value.items() if not name.startswith('rope_')}
    elif name not in _FREE | _RESOLVED:
      found[name] = value
  biases = {name: cfg.use_bias if value is None else value for name, value in (
      ('qkv_bias', cfg.qkv_bias), ('out_bias', cfg.out_bias), ('mlp_bias', cfg.mlp_bias), ('norm_bias', cfg.norm_bias))}
  if cfg.norm != 'layer_norm':
    del biases['norm_bias']
  layers = [cfg.layers[i % len(cfg.layers)] for i in range(cfg.num_layers)]
  found |= biases | {'num_kv_heads': cfg.K, 'head_dim': cfg.H, 'mlp_dim': cfg.F, 'windows': [x.window for x in layers],
                     'positions': [_words(x.rope) for x in layers] if cfg.positions == 'rope' else 'learned',
                     'query_scale': round(cfg.query_scale or cfg.H ** -0.5, 9)}
  if cfg.positions == 'rope':
    del found['max_len']  # only a limit
  return found


def _words(rope: Any) -> str:
  """A rope as it is compared and shown in messages."""
  if rope is None:
    return 'none'
  scaling = f', {rope.scaling}' if dataclasses.is_dataclass(rope.scaling) else ''
  return f'rope of base {rope.base}{scaling}' + (f', {rope.dim} features' if rope.dim else '')


def with_biases(cfg: Any) -> Any:
  """The same model with biases, which are then 0; the config itself if it has some, or norms without any."""
  apart = any(getattr(cfg, name, True) is not None for name in ('qkv_bias', 'out_bias', 'mlp_bias', 'norm_bias'))
  return cfg if apart or cfg.use_bias or cfg.norm != 'layer_norm' else dataclasses.replace(cfg, use_bias=True)


def choose_family(cfg: Any, wanted: str | None = None) -> tuple[str, dict[str, Any]]:
  """(model_type, the fields of config.json) of the first family that computes what the config does.

  A model without biases may be one with biases of 0; see `with_biases`. Raises ConfigError with what differs in the
  nearest family.
  """
  if wanted and wanted not in FAMILIES:
    raise ConfigError(f'--family: {wanted!r} is unknown; {known_names(wanted, FAMILIES)}')
  kind, cfg, differing = getattr(cfg, 'einsum', ''), as_packed(cfg), {}
  for model_type in [wanted] if wanted else FAMILIES:
    values, differs = written(cfg, model_type)
    if not differs:
      return model_type, values
    differing[model_type] = differs
  if with_biases(cfg) is not cfg:
    return choose_family(with_biases(cfg), wanted)
  nearest = min(differing, key=lambda name: ('name' in differing[name], len(differing[name])))
  lines = [f'config.model.{name.replace("packed.", f"{kind}.")}={mine}; it would fit with {theirs}'
           for name, (mine, theirs) in differing[nearest].items()]
  raise ConfigError(f'no family of transformers computes this model; the nearest is {nearest}, but\n  '
                    + '\n  '.join(lines)
                    + '\nllm-jax export --format=llm_jax writes it for this package; or register a family '
                    '(docs/huggingface.md)')


def linear_class(cfg: Any, family: Family) -> str:
  """That of a model of ours when it is published."""
  return 'bitlinear' if has_biases(cfg) else family.linear_class


def rules_to_write(cfg: Any, model_type: str) -> list[Any]:
  """The rules by which a model of ours is published; quantized matrices are packed."""
  family, kind = FAMILIES[model_type], getattr(cfg, 'einsum', '')
  if kind not in KINDS:
    return family.rules(cfg)
  return ternary_rules(family.rules(cfg), linear_class(cfg, family) == 'bitlinear',
                       cfg.sections['bitnet'].weight_bits if kind == 'bitnet' else None)


def read_shape(hf: Fields, *, vocab_size: int, kv_heads: int | None = None, tied: bool,
               max_len: int) -> dict[str, Any]:
  """The fields that most families share. `kv_heads` None: as many as heads."""
  heads = hf.count('num_attention_heads')
  head_dim, kv = hf.get('head_dim'), hf.get('num_key_value_heads', kv_heads or heads)
  own: dict[str, Any] = {'head_dim': head_dim} if head_dim is not None else {}
  return own | {
      'vocab_size': hf.count('vocab_size', vocab_size), 'embed_dim': hf.count('hidden_size'),
      'mlp_dim': hf.count('intermediate_size'), 'num_layers': hf.count('num_hidden_layers', most=10_000),
      'num_heads': heads, 'num_kv_heads': heads if kv is None else kv,
      'max_len': hf.count('max_position_embeddings', max_len), 'tie_embeddings': hf.flag('tie_word_embeddings', tied)}


def check_heads(hf: Fields) -> None:
  """Notes a problem that some classes of transformers find when they open a config, whatever head_dim is."""
  size, heads = hf.count('hidden_size'), hf.count('num_attention_heads')
  if size % heads:
    hf.problems.append(f'hidden_size={size}: must be a multiple of num_attention_heads {heads} in this family')


def write_shape(cfg: DecoderConfig) -> dict[str, Any]:
  return {'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed_dim, 'intermediate_size': cfg.F,
          'num_hidden_layers': cfg.num_layers, 'num_attention_heads': cfg.num_heads, 'num_key_value_heads': cfg.K,
          'head_dim': cfg.H, 'max_position_embeddings': cfg.max_len, 'tie_word_embeddings': cfg.tie_embeddings}


def read_rms_norm(hf: Fields, eps: float, offset: bool = False) -> dict[str, Any]:
  return {'norm': 'rms_norm', 'rms_norm': {'eps': float(hf.number('rms_norm_eps', eps)), 'offset': offset}}


def has_mlp_bias(cfg: DecoderConfig) -> bool:
  return cfg.use_bias if cfg.mlp_bias is None else cfg.mlp_bias


def rms_eps(cfg: DecoderConfig) -> float:
  """The eps of the config's RMSNorm; that of transformers where it has another norm."""
  return cfg.sections['rms_norm'].eps if 'rms_norm' in cfg.sections else 1e-6

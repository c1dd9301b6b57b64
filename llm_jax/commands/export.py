"""Exports a run's model as a folder with safetensors, config and tokenizer.

With --format=hf it is a folder of Hugging Face's transformers: AutoModelForCausalLM.from_pretrained(FOLDER) and
AutoTokenizer load it, and a model card describes it. Where torch and transformers are installed, the folder is compared
with them first: the same ids, logits and greedy tokens, or nothing is written.

With --format=llm_jax, the default, the folder is for this package alone. Matrices are packed at two bits per weight: a
model trained with config.model.einsum=bitnet computes the same as before; one of full precision is rounded, with worse
results. --weight_bits=32 writes all weights unchanged. Both folders can be used like a run: llm-jax generate
--workdir=FOLDER, and evaluate.

  llm-jax export runs/gpt_small --format=hf --out=exported --dtype=bfloat16
  llm-jax export runs/gpt_small --out=exported --weight_bits=32
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import run_as_program, waiting


def parser() -> flags.Parser:
  parser = flags.Parser('export', __doc__)
  flags.add_run(parser)
  flags.add_mesh(parser)
  parser.add_argument('--out', type=Path, metavar='FOLDER', required=True, help='folder to create')
  parser.add_argument('--weight_bits', choices=('1.58', '1', '32'),
                      help='for llm_jax; 32: unchanged (default: as in training with bitnet, else 1.58)')
  parser.add_argument('--format', choices=('llm_jax', 'hf'), default='llm_jax', help='of the folder')
  hf = parser.add_argument_group('with --format=hf')
  hf.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help='of the weights (default: float32)')
  hf.add_argument('--max_shard', metavar='SIZE', help='of a file of weights, such as 500MB (default: 5GB)')
  hf.add_argument('--family', metavar='NAME', help='model_type of the folder (default: the first that fits)')
  hf.add_argument('--license', metavar='NAME', help='of the model, for its card, such as apache-2.0 (default: none)')
  hf.add_argument('--check', choices=('auto', 'always', 'never'),
                  help='compare with transformers (default: auto, if it and torch are installed)')
  hf.add_argument('--push', metavar='ORG/NAME',
                  help='upload the folder to the Hugging Face Hub, with HF_TOKEN (default: do not)')
  flags.add(parser)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  if args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
    raise ConfigError(f'--out: {args.out} already exists; name a new folder')

  ours, theirs = {'--weight_bits': args.weight_bits}, {
      f'--{name}': getattr(args, name) for name in ('dtype', 'max_shard', 'family', 'license', 'check', 'push')}
  if wrong := [flag for flag, value in (theirs if args.format == 'llm_jax' else ours).items() if value is not None]:
    raise ConfigError(f'{", ".join(wrong)}: has no effect with --format={args.format}; leave it out, or set '
                      f'--format={"hf" if args.format == "llm_jax" else "llm_jax"}')
  flags.apply(args)
  from llm_jax.base.multihost import barrier, is_first
  from llm_jax.base.trees import by_name
  from llm_jax.data.pipeline import example_batch
  from llm_jax.infer.export import EXPORTERS, FILE, FOLDER_FORMATS, write_config, write_params
  from llm_jax.infer.mesh import loaded_on_mesh
  from llm_jax.training.shardings import boxed_params, param_info

  with loaded_on_mesh(args.workdir, args.checkpoint, args.mesh, trust=args.trust) as run:
    if args.format == 'hf':
      if 'hf' not in FOLDER_FORMATS:
        raise ConfigError('--format: this copy of llm_jax has no folders of transformers; set it to llm_jax')
      print('\n'.join(FOLDER_FORMATS['hf'].write(run, args)))
      barrier('end')  # the others would wait for process 0 for a minute only
      return
    info = param_info(boxed_params(example_batch(run.config.data), model=run.model))
    if args.weight_bits != '32' and 'packed' not in EXPORTERS:
      raise ConfigError('--weight_bits: this copy of llm_jax cannot pack weights; set it to 32')
    exporter = EXPORTERS['plain' if args.weight_bits == '32' else 'packed']
    model, arrays = exporter.export(run.config, run.params, info, args.weight_bits)
    waiting(f'writing {args.out}')
    config = dataclasses.replace(run.config, model=model)
    if is_first():
      write_config(args.out, config, run.tokenizer, run.encoder_tokenizer, '--out')
    write_params(args.out / FILE, arrays, run.meta)
  for line in size_table(by_name(run.params), arrays) if is_first() else ():
    print(line)
  if is_first():
    print(f'{args.out / FILE}: {(args.out / FILE).stat().st_size:,} bytes')
  barrier('end')


def size_table(params: Any, arrays: dict[str, Any]) -> list[str]:
  """A table of bytes of the parameters, packed matrices apart: as float32, as bfloat16 and as written."""
  packed, total = params.keys() - arrays.keys(), sum(leaf.size for leaf in params.values())
  count, size = sum(params[name].size for name in packed), sum(arrays[name].nbytes for name in arrays.keys() - params)
  written = sum(x.nbytes for x in arrays.values())
  rows = [('matrices', count, size), ('all else', total - count, written - size)] if packed else []
  rows.append(('together', total, written))
  return [f'{"":10} {"parameters":>14} {"float32":>14} {"bfloat16":>14} {"written":>14}  bytes'] + [
      f'{kind:10} {count:14,} {4 * count:14,} {2 * count:14,} {size:14,}  {8 * size / max(1, count):.2f} bits each'
      for kind, count, size in rows]


if __name__ == '__main__':
  run_as_program(main)

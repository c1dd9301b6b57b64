"""Presets of 124 million to 70 billion parameters, compiled for 8 to 4,096 GPUs: memory, bytes and seconds of a step.

  pip install 'llm_jax[plan-gpu]'
  python -m benchmarks.fleet
  python -m benchmarks.fleet --only=llama_8b

Nothing is run: each row is a `llm-jax plan`, in a process of its own, of half a minute to a few minutes. Seconds are
FLOPs at an MFU of 40%, and bytes at the bandwidths of llm_jax/extras/plan/kinds.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# (preset, GPUs, tokens of a step, tokens on a GPU at a time, mesh)
ROWS: tuple[tuple[str, int, int, int, dict[str, int]], ...] = (
    ('gpt_small', 8, 2**19, 16_384, {'data': 8}),
    ('gpt_small', 64, 2**20, 16_384, {'data': 64, 'dcn_data': 8}),
    ('llama_1b', 8, 2**20, 16_384, {'fsdp': 8}),
    ('llama_1b', 64, 2**21, 16_384, {'data': 8, 'fsdp': 8, 'dcn_data': 8}),
    ('llama_1b', 256, 2**22, 16_384, {'data': 32, 'fsdp': 8, 'dcn_data': 32}),
    ('llama_8b', 64, 2**22, 32_768, {'fsdp': 64}),
    ('llama_8b', 512, 2**24, 32_768, {'data': 8, 'fsdp': 64, 'dcn_data': 8, 'dcn_fsdp': 8}),
    ('llama_8b', 1024, 2**25, 32_768, {'data': 16, 'fsdp': 64, 'dcn_data': 16, 'dcn_fsdp': 8}),
    ('llama_70b', 256, 2**23, 32_768, {'fsdp': 32, 'tensor': 8}),
    ('llama_70b', 1024, 2**24, 32_768, {'fsdp': 128, 'tensor': 8}),
    ('llama_70b', 1024, 2**24, 16_384, {'stage': 4, 'fsdp': 32, 'tensor': 8}),
    ('llama_70b', 4096, 2**26, 32_768, {'data': 4, 'fsdp': 128, 'tensor': 8, 'dcn_data': 4, 'dcn_fsdp': 128}),
)


def plan(preset: str, devices: int, batch: int, held: int, mesh: dict[str, int]) -> dict[str, Any]:
  """The JSON of a plan; raises subprocess.CalledProcessError."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'plan.json'
    sizes = {'data': 1, **mesh}
    subprocess.run([sys.executable, '-m', 'llm_jax', 'plan', f'--config={preset}', f'--on=h100:{devices}',
                    f'--json={path}',
                    f'--config.batch_tokens={batch}', f'--config.tokens_per_device={held}', '--full_size',
                    *(f'--config.mesh.{name}={size}' for name, size in sizes.items())],
                   check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def figures(found: dict[str, Any]) -> dict[str, Any]:
  """What a row of the table has."""
  rows = found['collectives']
  return {'parameters': found['num_parameters'], 'gib': found['memory']['compiled']['peak'] / 2**30,
          'fits': found['memory']['fits'], 'compute_s': found['work']['step_seconds'],
          'links_gb': sum(row['wire_bytes'] - row['network_bytes'] for row in rows) / 1e9,
          'network_gb': sum(row['network_bytes'] for row in rows) / 1e9,
          'wire_s': sum(row['seconds'] for row in rows),
          'alone_s': sum(row['seconds'] for row in rows if not row['overlapped']),
          'compile_s': found['seconds']['compile']}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--only', help='rows of this preset')
  args = flags.parse_args()
  print('| Preset | H100s | Mesh | Tokens of a step | on a GPU at a time | Memory, GiB | Links, GB | Network, GB | '
        'Computing, s | Sending, s | of it alone, s | Compiled in, s |')
  print('|' + '---|' * 12)
  measured = []
  for preset, devices, batch, held, mesh in ROWS:
    if args.only in (None, preset):
      row = figures(plan(preset, devices, batch, held, mesh))
      measured.append({'preset': preset, 'devices': devices, 'batch_tokens': batch, 'held': held, 'mesh': mesh, **row})
      sizes = ' x '.join(f'{name} {size}' for name, size in mesh.items() if not name.startswith('dcn'))
      print(f'| `{preset}` | {devices:,} | {sizes} | {batch:,} | {held:,} | {row["gib"]:.1f} | {row["links_gb"]:.2f} | '
            f'{row["network_gb"]:.2f} | {row["compute_s"]:.2f} | {row["wire_s"]:.2f} | {row["alone_s"]:.2f} | '
            f'{row["compile_s"]:.0f} |', flush=True)
  print(json.dumps(measured))


if __name__ == '__main__':
  main()

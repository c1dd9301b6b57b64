"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.base.process import gib

PARTS = {'parameters': 'parameters', 'optimizer': 'optimizer state', 'gradients': 'gradients',
         'copies': 'weights in the dtype of operands', 'activations': 'activations', 'logits': 'logits'}


def lines(plan: dict[str, Any]) -> Iterator[str]:
  """The whole report."""
  mesh = ' '.join(f'{axis}={size}' for axis, size in plan['mesh'].items() if size > 1 or axis == 'data')
  yield f'on {plan["on"]}: {plan["devices"]} x {plan["kind"]}, mesh {mesh}'
  yield from plan['model']
  yield 'dtypes: ' + ', '.join(f'{name} {value}' for name, value in plan['dtypes'].items())
  yield (f'batch: {plan["work"]["tokens_per_step"]} tokens = {plan["microbatches"]} microbatch(es) x {plan["rows"]} '
         f'row(s) on each device; remat {plan["settings"]["model.remat"]}')
  yield from filter(None, [plan['pipeline']])
  yield ''
  yield from parameters(plan)
  yield ''
  yield from memory(plan)
  yield ''
  yield from work(plan['work'])
  for part in (collectives, kernels):
    found = list(part(plan))
    if found:
      yield ''
      yield from found


def parameters(plan: dict[str, Any]) -> Iterator[str]:
  """The table of parameters."""
  yield f'{plan["num_parameters"]:,} parameters; bytes are of one device'
  rows = [('parameter', 'shape', 'logical axes', 'mesh axes', 'on a device', 'bytes')]
  rows += [(row['name'], sides(row['shape']), ', '.join(axis or '-' for axis in row['axes']),
            ', '.join(named(entry) for entry in row['spec']), sides(row['shard']), gib(row['bytes']))
           for row in plan['parameters']]
  yield from table(rows)


def memory(plan: dict[str, Any]) -> Iterator[str]:
  """Memory of a device by use, what the compiler says, and what to change where it does not fit."""
  found = plan['memory']
  yield 'memory of a device, by estimate:'
  for name, text in PARTS.items():
    yield f'  {text:34} {gib(found["estimate"][name]):>12}'
  yield f'  {"together":34} {gib(found["estimate"]["total"]):>12}'
  if compiled := found.get('compiled'):
    yield 'by the compiler:'
    for name in ('arguments', 'temporaries', 'code', 'scratch', 'peak'):
      yield f'  {name:34} {gib(compiled[name]):>12}'
  if found['failure']:
    yield f'the compiler: {found["failure"]}'
  if found['limit']:
    yield (f'a device has {gib(found["limit"])}, of which a step may take {found["share"]:.0%}: '
           f'it {"fits" if found["fits"] else "does NOT fit"}')
  if found['fits'] is False:
    advice = plan.get('advice')
    yield ('the fastest that fits, by estimate: ' + ' '.join(
        f'--config.{name}={value}' for name, value in advice['settings'].items()) + f' ({gib(advice["bytes"])}); '
        '--search compiles it' if advice else
        'nothing fits that was tried (microbatches of one row, remat=full, other meshes with --search): use more '
        'devices, shorter rows or a smaller model')


def work(found: dict[str, Any]) -> Iterator[str]:
  """FLOPs, tokens, time and money."""
  data = (f', {found["epochs"]:.3g} epochs over the {found["data_tokens"]:,} of the data' if found['epochs'] is not None
          else '; --data counts those of the data, --data_tokens sets their number')
  yield f'FLOPs: {found["flops_per_token"]:.4g} a token, {found["flops_per_token"] * found["tokens"]:.4g} in all'
  yield f'tokens: {found["tokens"]:,}, {found["tokens_per_step"]:,} a step{data}'
  if found['hours'] is None:
    yield 'time: unknown, as the peak of these devices is'
    return
  yield (f'time at an MFU of {found["mfu"]:.0%}: {found["step_seconds"]:.3g} s a step, {found["hours"]:.3g} h, '
         f'{found["device_hours"]:,.0f} device-hours')
  yield f'money: ${found["dollars"]:,.0f} at ${found["price"]:.2f} for an hour of a device (--price)'


def collectives(plan: dict[str, Any]) -> Iterator[str]:
  """The table of collectives of a step."""
  if 'collectives' not in plan:
    return
  rows = plan['collectives']
  total, open_ = (sum(row['wire_bytes'] for row in rows if keep(row)) for keep in (
      lambda row: True, lambda row: not row['overlapped']))
  yield f'collectives of a step: a device sends {size(total)}, of which {size(open_)} while it does not compute'
  if network := sum(row['network_bytes'] for row in rows):
    yield f'  of it {size(network)} over the network between slices or hosts'
  yield from table([('collective', 'mesh axes', 'dtype', 'executions', 'sent', 'by network', 'seconds', 'overlaps')] + [
      (row['kind'], ', '.join(row['axes']) or '-', row['dtype'], str(row['executions']), size(row['wire_bytes']),
       size(row['network_bytes']) if row['network_bytes'] else '-',
       '-' if row['seconds'] is None else f'{row["seconds"]:.4f}', 'yes' if row['overlapped'] else 'no')
      for row in rows])


def kernels(plan: dict[str, Any]) -> Iterator[str]:
  """Kernels, traffic of memory and seconds of the compiler."""
  if found := plan.get('kernels'):
    yield 'kernels of a step: ' + ', '.join(f'{name} x {count}' for name, count in sorted(found.items()))
  if traffic := plan.get('traffic'):
    seconds = '' if traffic['seconds'] is None else f', at least {traffic["seconds"]:.3g} s'
    yield f'traffic of memory: about {size(traffic["bytes"])} a step{seconds}'
  if spent := plan.get('seconds'):
    yield f'traced in {spent["lower"]:.1f} s, compiled in {spent["compile"]:.1f} s'


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
  """Rows with columns of equal width."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    yield '  ' + '  '.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def sides(shape: Sequence[int]) -> str:
  return ' x '.join(map(str, shape)) or 'scalar'


def named(entry: Any) -> str:
  return '-' if entry is None else entry if isinstance(entry, str) else '+'.join(entry)


def size(count: float) -> str:
  """Bytes on a wire, as its makers count them."""
  return f'{count / 1e9:.2f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'

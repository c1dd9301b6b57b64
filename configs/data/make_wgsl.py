"""Writes wgsl.jsonl: what a small shader should do, in words, and the WGSL that does it. Our own; no other data.

  python configs/data/make_wgsl.py

A program is a function (vector operations, built-ins, filters) or a whole fragment or compute shader (colours, mixing,
buffers). Every description and every program is there once. https://www.w3.org/TR/WGSL/ says what the words mean.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

COLORS = {
    'red': (1, 0, 0), 'green': (0, 1, 0), 'blue': (0, 0, 1), 'white': (1, 1, 1), 'black': (0, 0, 0),
    'yellow': (1, 1, 0), 'cyan': (0, 1, 1), 'magenta': (1, 0, 1), 'orange': (1, 0.5, 0), 'purple': (0.5, 0, 0.5),
    'gray': (0.5, 0.5, 0.5), 'pink': (1, 0.75, 0.8), 'brown': (0.6, 0.3, 0.1), 'teal': (0, 0.5, 0.5),
    'navy': (0, 0, 0.5), 'lime': (0.75, 1, 0), 'gold': (1, 0.8, 0), 'olive': (0.5, 0.5, 0),
}
VECTORS = {'two': 'vec2<f32>', 'three': 'vec3<f32>', 'four': 'vec4<f32>'}
TYPES = {'a number': 'f32', **{f'a vector of {n}': t for n, t in VECTORS.items()}}
BUILT_INS = {
    'sine': 'sin', 'cosine': 'cos', 'tangent': 'tan', 'absolute value': 'abs', 'floor': 'floor', 'ceiling': 'ceil',
    'fractional part': 'fract', 'square root': 'sqrt', 'inverse square root': 'inverseSqrt', 'exponential': 'exp',
    'natural logarithm': 'log', 'base two logarithm': 'log2', 'sign': 'sign', 'rounded value': 'round',
    'truncated value': 'trunc', 'saturated value': 'saturate', 'arc sine': 'asin', 'arc cosine': 'acos',
    'arc tangent': 'atan', 'power of two': 'exp2',
}
SHARES = {'a tenth': '0.1', 'a quarter': '0.25', 'a third': '0.333', 'half': '0.5', 'three quarters': '0.75'}


def vec3(color: str) -> str:
  return 'vec3<f32>({})'.format(', '.join(str(float(x)) for x in COLORS[color]))


def fragment(*lines: str) -> str:
  body = ''.join(f'  {line}\n' for line in lines)
  return f'@fragment\nfn main(@location(0) uv: vec2<f32>) -> @location(0) vec4<f32> {{\n{body}}}'


def compute(line: str) -> str:
  return ('@group(0) @binding(0) var<storage, read_write> data: array<f32>;\n@compute @workgroup_size(64)\n'
          f'fn main(@builtin(global_invocation_id) id: vec3<u32>) {{\n  {line}\n}}')


def function(name: str, arguments: str, result: str, value: str) -> str:
  return f'fn {name}({arguments}) -> {result} {{\n  return {value};\n}}'


def pairs() -> Iterator[tuple[str, str]]:
  for color in COLORS:
    yield f'fill the screen with {color}', fragment(f'return vec4<f32>({vec3(color)}, 1.0);')
    yield f'return the color {color}', function(color, '', 'vec3<f32>', vec3(color))
    yield (f'fade from black to {color} along the x axis',
           fragment(f'let color = {vec3(color)} * uv.x;', 'return vec4<f32>(color, 1.0);'))
    yield (f'draw a disc of {color} in the middle of the screen',
           fragment('let inside = step(distance(uv, vec2<f32>(0.5, 0.5)), 0.25);',
                    f'return vec4<f32>({vec3(color)} * inside, 1.0);'))
  for (first, second), (words, share) in itertools.product(
      itertools.pairwise(sorted(COLORS)), SHARES.items()):
    yield (f'mix {first} with {words} of {second}',
           fragment(f'let color = mix({vec3(first)}, {vec3(second)}, {share});', 'return vec4<f32>(color, 1.0);'))
  for (words, name), (what, kind) in itertools.product(BUILT_INS.items(), TYPES.items()):
    yield f'compute the {words} of {what}', function(f'{name}_of', f'x: {kind}', kind, f'{name}(x)')
  for number, kind in VECTORS.items():
    two = f'a: {kind}, b: {kind}'
    yield f'normalize a vector of {number}', function('unit', f'v: {kind}', kind, 'normalize(v)')
    yield f'the length of a vector of {number}', function('size', f'v: {kind}', 'f32', 'length(v)')
    yield f'the dot product of two vectors of {number}', function('dot_of', two, 'f32', 'dot(a, b)')
    yield f'the distance of two points of {number}', function('far', two, 'f32', 'distance(a, b)')
    yield f'the middle of two points of {number}', function('middle', two, kind, '(a + b) * 0.5')
    yield f'the larger parts of two vectors of {number}', function('larger', two, kind, 'max(a, b)')
    yield f'the smaller parts of two vectors of {number}', function('smaller', two, kind, 'min(a, b)')
    yield f'reflect a vector of {number} at a normal', function('mirrored', two, kind, 'reflect(a, b)')
    yield f'project a vector of {number} on another', function('projected', two, kind, 'b * (dot(a, b) / dot(b, b))')
  yield ('the cross product of two vectors of three',
         function('cross_of', 'a: vec3<f32>, b: vec3<f32>', 'vec3<f32>', 'cross(a, b)'))
  color = 'color: vec3<f32>', 'vec3<f32>'
  yield 'turn a color to gray', function('gray', *color, 'vec3<f32>(dot(color, vec3<f32>(0.299, 0.587, 0.114)))')
  yield 'invert a color', function('inverted', *color, 'vec3<f32>(1.0) - color')
  yield 'swap red and blue of a color', function('swapped', *color, 'color.bgr')
  for part, name in zip('rgb', ('red', 'green', 'blue'), strict=True):
    kept = ', '.join(f'color.{p}' if p == part else '0.0' for p in 'rgb')
    lost = ', '.join('0.0' if p == part else f'color.{p}' for p in 'rgb')
    yield f'keep only the {name} of a color', function(f'only_{name}', *color, f'vec3<f32>({kept})')
    yield f'remove the {name} of a color', function(f'without_{name}', *color, f'vec3<f32>({lost})')
  for words, share in SHARES.items():
    yield f'brighten a color by {words}', function('brighter', *color, f'color * (1.0 + {share})')
    yield f'darken a color by {words}', function('darker', *color, f'color * (1.0 - {share})')
    yield f'desaturate a color by {words}', function(
        'paler', *color, f'mix(color, vec3<f32>(dot(color, vec3<f32>(0.299, 0.587, 0.114))), {share})')
    yield f'black or white of a color at {words}', function(
        'threshold', *color, f'step(vec3<f32>({share}), color)')
    yield f'multiply all data by {words}', compute(f'data[id.x] = data[id.x] * {share};')
    yield f'add {words} to all data', compute(f'data[id.x] = data[id.x] + {share};')
  for words, name in BUILT_INS.items():
    yield f'replace all data by its {words}', compute(f'data[id.x] = {name}(data[id.x]);')


def main() -> None:
  found = list(pairs())
  assert len({text for text, _ in found}) == len({answer for _, answer in found}) == len(found)
  lines = [json.dumps({'text': text, 'answer': answer}) + '\n' for text, answer in found]
  path = Path(__file__).parent / 'wgsl.jsonl'
  path.write_text(''.join(lines))
  print(f'{len(found)} pairs in {path}')


if __name__ == '__main__':
  main()

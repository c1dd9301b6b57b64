"""The layers of the package: a module imports only from layers below its own."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'llm_jax'
# From the bottom up. A name stands for a module or for all modules of a folder; the longest that fits counts.
FLOORS = [
    {'base'},
    {'layers', 'losses', 'optim', 'data', 'infer.validators', 'infer.export'},
    {'models'},
    {'config'},
    {'training.state', 'training.checkpoint', 'training.stages', 'training.log', 'training.status', 'training.best',
     'infer.sampling', 'infer.answers', 'infer.text'},
    {'infer.score', 'infer.load'},
    {'training.custom', 'training.teacher', 'training.flops', 'training.memory', 'training.resolve'},
    {'infer.trained', 'training.program'},
    {'training.run', 'training.resume', 'training.session'},
    {'training.loop'},
    {'api'},
    {'main'},
    {'commands'},
    {'__main__', 'extras'},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PATHS = sorted(path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py')


def module_of(path: Path) -> str:
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def floor_of(module: str) -> int:
  parts = module.split('.')
  names = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
  found = next((name for name in names if name in FLOOR), None)
  assert found, f'{module} has no floor: add it to FLOORS'
  return FLOOR[found]


def imports(path: Path) -> set[str]:
  """Modules of the package that a file imports, at its top or inside a function."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'llm_jax':
      folder = node.module.removeprefix('llm_jax').lstrip('.')
      for alias in node.names:
        name = f'{folder}.{alias.name}'.lstrip('.')
        is_module = PACKAGE.joinpath(*name.split('.')).with_suffix('.py').exists()
        found.add(name if is_module else folder)
  return found - {''}


@pytest.mark.parametrize('path', PATHS, ids=module_of)
def test_imports_go_down(path):
  own, folder = module_of(path), module_of(path).split('.')[0]
  for name in imports(path):
    same_folder = name.split('.')[0] == folder and floor_of(name) == floor_of(own)
    within = floor_of(own) == floor_of(name) == 1 and folder in ('losses', 'optim') and name.startswith('layers')
    allowed = same_folder or floor_of(name) < floor_of(own) or within
    assert allowed, f'{own} (floor {floor_of(own)}) imports {name} (floor {floor_of(name)})'


def test_only_model_code_imports_flax_linen():
  for path in PATHS:
    if 'flax.linen' in path.read_text():
      own = module_of(path)
      assert own.startswith(('layers.', 'models.', 'extras.', 'training.state', 'commands.inspect_run', 'api')), own


def test_the_core_imports_no_extras():
  for path in PATHS:
    own = module_of(path)
    assert own.startswith(('extras', '__main__')) or not [n for n in imports(path) if n.startswith('extras')], own


def test_files_have_at_most_400_lines():
  sizes = {path.name: len(path.read_text().splitlines()) for path in PATHS}
  assert not {name: size for name, size in sizes.items() if size > 400}


def test_init_files_hold_no_logic():
  for path in PACKAGE.rglob('__init__.py'):
    if path.parent != PACKAGE:  # whose names are loaded when asked for
      assert not path.read_text().strip(), path


def test_no_module_has_the_name_of_a_standard_library_module():
  assert not [path for path in PATHS if path.stem in sys.stdlib_module_names and path.stem != '__main__']

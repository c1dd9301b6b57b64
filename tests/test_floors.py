"""The layers of the package: a module imports only from layers below its own."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / 'llm_jax'
# From the bottom up. A name stands for a module or for all modules of a folder; the longest that fits counts.
FLOORS = [
    {'base'},
    {'layers', 'losses', 'optim', 'data', 'infer.validators', 'infer.options', 'infer.export',
     'infer.importers', 'infer.harness', 'infer.tensor_file'},
    {'models'},
    {'config'},
    {'config_file'},
    {'training.accumulate'},
    {'training.state', 'training.shardings', 'training.checkpoint', 'training.orbax_io',
     'training.manifest', 'training.retention', 'training.finite',
     'training.stages', 'training.log', 'training.skips',
     'training.console', 'training.throughput', 'training.status', 'training.launches', 'training.best',
     'training.ending', 'training.lost', 'infer.sampling', 'infer.answers', 'infer.text'},
    {'infer.score', 'infer.load', 'infer.mesh'},
    {'training.custom', 'training.histograms', 'training.flops', 'training.memory', 'training.resolve',
     'training.estimate'},
    {'infer.trained', 'training.program'},
    {'training.run', 'training.resume', 'training.growth', 'training.session', 'training.event',
     'training.rewind'},
    {'training.loop'},
    {'api'},
    {'main'},
    {'commands'},
    {'__main__', 'extras'},
    {'hf'},
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
      assert own.startswith(('layers.', 'models.', 'extras.', 'training.state', 'training.shardings',
                             'api')), own


def test_the_core_imports_no_extras():
  for path in PATHS:
    own = module_of(path)
    assert own.startswith(('extras', 'hf', '__main__')) or not [
        n for n in imports(path) if n.startswith(('extras', 'hf'))], own


def test_files_and_functions_are_short():
  sizes = {module_of(path): len(path.read_text().splitlines()) for path in PATHS}
  assert not {name: size for name, size in sizes.items() if size > 400}
  assert not {f'{module_of(path)}.{node.name}': size for path in PATHS for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
              and (size := node.end_lineno - node.lineno + 1) > 60}


READING_PATH = ['main', 'api', 'training.loop', 'training.session', 'training.program', 'training.state',
                'models.decoder', 'layers.linear', 'layers.attention', 'layers.norm', 'layers.rope', 'layers.mlp']


def test_the_reading_path_is_short():
  sizes = {module_of(path): len(path.read_text().splitlines()) for path in PATHS if module_of(path) in READING_PATH}
  print('\n'.join(f'{sizes[name]:5} {name}' for name in READING_PATH), f'\n{sum(sizes.values()):5} together')
  assert sum(sizes.values()) < 1500 and sizes['training.loop'] < 200


# Names that are the same on purpose: each command's main and parser, the door and the loop, a task and its loss.
SHARED_NAMES = {'main', 'parser', 'train', 'NextToken'}


def test_public_names_of_the_core_are_unique():
  places = {}
  for path in PATHS:
    for node in ast.parse(path.read_text()).body:
      public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_')
      if public and not module_of(path).startswith(('extras', 'hf')):
        places.setdefault(node.name, []).append(module_of(path))
  assert not {name: modules for name, modules in places.items() if len(modules) > 1 and name not in SHARED_NAMES}


def test_init_files_hold_no_logic():
  for path in PACKAGE.rglob('__init__.py'):
    if path.parent != PACKAGE:  # whose names are loaded when asked for
      assert not path.read_text().strip(), path


def test_no_module_has_the_name_of_a_standard_library_module():
  assert not [path for path in PATHS if path.stem in sys.stdlib_module_names and path.stem != '__main__']

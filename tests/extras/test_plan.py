"""llm-jax plan: targets, estimates, the step that is compiled for virtual devices, and the command."""

import json
from pathlib import Path

import jax
import pytest

from llm_jax import config_file
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.extras.commands import plan
from llm_jax.extras.plan.building import build, compile_step
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.extras.plan.targets import open_target, parse_place, stand_in_target
from llm_jax.extras.plan.work import bandwidth, collective_rows

CONFIGS = Path(__file__).parents[2] / 'configs'
TINY = {'model.num_layers': 2, 'model.embed_dim': 64, 'model.num_heads': 2, 'model.vocab_size': 256,
        'model.scan_unroll': 1, 'data.seq_len': 64, 'batch_tokens': 2048, 'tokens_per_device': 128}
FLAGS = [f'--config.{name}={value}' for name, value in TINY.items()]


def tiny(**overrides):
  return config_file.open_config(CONFIGS / 'gpt_small.py').resolve({**TINY, **overrides}, cpu_only=False)


@pytest.mark.parametrize('text, shape, number', [
    ('v5e:4x4', (4, 4), 16), ('v5p:2x2x1', (2, 2, 1), 4), ('h100:8', (1, 8), 8), ('h100:64', (8, 8), 64),
    ('h200:2x4', (2, 4), 8), ('cpu:3', (3,), 3)])
def test_places(text, shape, number):
  place = parse_place(text)
  assert place.shape == shape and place.num_devices == number


@pytest.mark.parametrize('text, message', [
    ('v9:2', 'legal are v5e, v5p'), ('v5e', 'has no shape, such as 2x2'), ('v5e:8', 'has 2 sides'),
    ('v5e:0x2', 'has no shape'), ('h100:12', 'not whole hosts of 8'), ('cpu:2x2', 'legal are cpu:N')])
def test_places_that_do_not_exist(text, message):
  with pytest.raises(ConfigError, match=message):
    parse_place(text)


def test_only_tpus_have_slices():
  assert parse_place('v5e:2x4', 2).num_devices == 16
  with pytest.raises(ConfigError, match='only TPUs have slices'):
    parse_place('h100:8', 2)


def test_collectives_across_hosts_use_the_network():
  text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %inside = f32[1024]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %across = f32[1024]{0} all-reduce(%inside), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""
  place = parse_place('h100:2x4')
  rows = collective_rows(read_collectives(text, {'data': 2, 'fsdp': 4, 'tensor': 1}, [0] * 4 + [1] * 4), place)
  [across], [inside] = ([row for row in rows if row['axes'] == [axis]] for axis in ('data', 'fsdp'))
  assert inside['network_bytes'] == 0 and inside['seconds'] == inside['wire_bytes'] / place.kind.link
  assert across['network_bytes'] == across['wire_bytes'] == 4096
  assert across['seconds'] == across['wire_bytes'] / place.kind.network
  assert not any(row['network_bytes'] for row in collective_rows(read_collectives(text, {'data': 2, 'fsdp': 4}), place))

  whole = text.replace('[4,2]<=[2,4]T(1,0)', '[1,8]<=[8]')
  [both] = [row for row in collective_rows(read_collectives(whole, {'data': 2, 'fsdp': 4}, [0] * 4 + [1] * 4), place)
            if len(row['axes']) == 2]
  assert both['wire_bytes'] == 2 * 7 / 8 * 4096 and both['network_bytes'] == both['wire_bytes'] / 4

  mesh = make_mesh(MeshConfig(2, 4))  # of CPUs, which stand in for GPUs
  assert bandwidth(place, mesh, ('fsdp',)) == place.kind.link
  assert bandwidth(place, mesh, ('data',)) == bandwidth(place, mesh, ('data', 'fsdp')) == place.kind.network


def test_a_stand_in_decides_as_its_kind():
  built = build(tiny(**{'mesh.fsdp': 8, 'mesh.data': 1}), stand_in_target(parse_place('h100:8')), read_data=False)
  model = built.config.model
  assert (model.dtype, model.product_dtype, model.stream_dtype) == ('bfloat16', 'bfloat16', 'bfloat16')
  assert built.mesh.shape['fsdp'] == 8


def test_the_step_is_that_of_a_run(tmp_path):
  from llm_jax.training.custom import Custom
  from llm_jax.training.program import build_program
  from llm_jax.training.stages import make_stages
  config = tiny(**{'data.path': str(Path(__file__)), 'data.tokenizer': 'byte', 'model.vocab_size': 512})
  built = build(config, open_target(parse_place('cpu:8')), read_data=True)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    program = build_program(make_stages(config)[0], tmp_path, mesh, Custom())
    text = program.step.lower(program.abstract, built.batch, {}).as_text()
  assert built.lower(program.num_microbatches).as_text() == text
  assert built.flops_per_token == program.flops_per_token and built.train_tokens > 1000


def test_memory_of_the_state_is_exact():
  built = build(tiny(**{'mesh.fsdp': 4, 'mesh.data': 2}), open_target(parse_place('cpu:8')), read_data=False)
  compiled = compile_step(built, 2)
  from llm_jax.training.estimate import estimate
  found = estimate(built.config, built.abstract, built.mesh, 2, 'cpu')
  batch = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(built.batch)) // 8
  assert abs(found.state + batch - compiled.memory['arguments']) < 2000  # scalars of the optimizer
  assert compiled.memory['peak'] >= compiled.memory['arguments'] + compiled.memory['temporaries']


def test_the_command_reports_and_writes_json(tmp_path, capsys):
  plan.main([f'--config={CONFIGS}/gpt_small.py', '--on=cpu:8', '--full_size', f'--json={tmp_path}/plan.json',
             '--data_tokens=1e9', '--config.mesh.fsdp=2', *FLAGS])
  text, values = capsys.readouterr().out, json.loads((tmp_path / 'plan.json').read_text())
  assert 'blocks/attn/q/w' in text and 'by the compiler:' in text and 'epochs over' in text
  mesh = {'stage': 1, 'data': 4, 'fsdp': 2, 'context': 1, 'tensor': 1}
  assert values['mesh'] == mesh and values['rows'] == 2
  assert values['memory']['compiled']['peak'] > values['memory']['compiled']['arguments']
  [table] = [row for row in values['parameters'] if row['name'] == 'embed/w']
  assert table['shape'] == [256, 64] and table['shard'] == [256, 32] and table['bytes'] == 256 * 32 * 4


def test_what_does_not_fit_gets_advice(capsys):
  plan.main([f'--config={CONFIGS}/gpt_small.py', '--on=cpu:8', '--full_size', '--estimate', *FLAGS])
  assert 'by estimate' in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_refused_before_compiling(tmp_path):
  with pytest.raises(ConfigError, match=r'--json: .*missing is not a folder'):
    plan.main(['--config=gpt_small', '--on=v5e:2x2', f'--json={tmp_path / "missing" / "plan.json"}'])

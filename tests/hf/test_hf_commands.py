"""Commands on a folder of a published model: generate, evaluate, train from it, and export as one again."""

import dataclasses
import json
import random
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cases import random_config
from program import write_config
from safetensors import safe_open
from test_families import batch_of
from weights import abstract_of, write_folder

from llm_jax import main
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.commands import evaluate, export, generate
from llm_jax.config import CheckpointConfig, Config, StartConfig
from llm_jax.data.config import DataConfig
from llm_jax.data.tokenizers.huggingface import Bpe
from llm_jax.extras.commands import config_fields
from llm_jax.hf import check
from llm_jax.hf.callback import ExportModel
from llm_jax.hf.export import parse_size, write_model
from llm_jax.hf.origin import license_of, origin_of
from llm_jax.infer.importers import importer_of
from llm_jax.infer.load import Loaded, load_run
from llm_jax.infer.text import prompt_ids
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.training.custom import Custom, with_named_callbacks
from llm_jax.training.log import read_metrics


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hf')
  write_config(folder)
  values = random_config('llama', random.Random(11)) | {'vocab_size': 300, 'rope_scaling': None,
                                                        'max_position_embeddings': 64}
  write_folder(folder / 'model', values, make_mesh(MeshConfig(), jax.devices()[:1]))
  corpus = [path.read_text() for path in sorted((folder / 'corpus').iterdir())]
  (folder / 'model/tokenizer.json').write_text(Bpe.fit(corpus, 280, 1).to_json())
  return folder


def test_generate_and_evaluate_read_the_folder(folder, capsys):
  generate.main([f'--workdir={folder}/model', '--prompt=def ', '--num_tokens=4', '--temperature=0'])
  assert capsys.readouterr().out.startswith('def ')
  evaluate.main([f'--workdir={folder}/model', f'--data={folder}/corpus', f'--out={folder}/evaluation.json'])
  assert json.loads((folder / 'evaluation.json').read_text())['loss'] > 1
  with pytest.raises(ConfigError, match='--data=FILE'):
    evaluate.main([f'--workdir={folder}/model'])


@pytest.mark.parametrize('ends', [list(range(300)), 280])
def test_a_text_ends_at_each_eos_of_generation_config(folder, capsys, ends):
  """With every id among them no text has a token; ids that the model never writes change nothing."""
  out = folder / 'model/generation_config.json'
  out.write_text(json.dumps({'eos_token_id': ends}))
  generate.main([f'--workdir={folder}/model', '--prompt=def ', '--num_tokens=4', '--temperature=0'])
  assert (capsys.readouterr().out.strip() == 'def') == (ends != 280)
  run = load_run(folder / 'model', make_mesh(MeshConfig(), jax.devices()[:1]))
  write_model(run, folder / f'ends_{ends == 280}')
  written = json.loads((folder / f'ends_{ends == 280}/generation_config.json').read_text())['eos_token_id']
  assert set(written) >= set(np.atleast_1d(ends).tolist())
  out.unlink()


def test_a_run_starts_from_it_and_is_exported_again(folder, capsys):
  """The command line's start.run brings the model and the tokenizer; without training the weights stay bit-equal."""
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/run', f'--config.start.run={folder}/model',
             '--config.num_steps=2', '--config.optim.learning_rate=1e-30', '--config.eval.every=2',
             '--config.log.every=2', '--config.eval.sample_tokens=0', '--config.model.vocab_multiple=128',
             '--config.checkpoint.export_every=2'])
  config = json.loads((folder / 'run/config.json').read_text())
  assert config['model']['norm'] == 'rms_norm' and config['model']['vocab_size'] == 300
  assert config['data']['tokenizer'] == f'{folder}/model/tokenizer.json'
  assert read_metrics(folder / 'run/metrics.jsonl')
  export.main([f'--workdir={folder}/run', f'--out={folder}/out', '--format=hf', '--max_shard=50KB', '--check=never',
               '--license=apache-2.0'])
  assert 'LlamaForCausalLM' in capsys.readouterr().out
  assert len(list((folder / 'out').glob('model-*.safetensors'))) > 1
  index = json.loads((folder / 'out/model.safetensors.index.json').read_text())['weight_map']
  with safe_open(folder / 'model/model.safetensors', 'numpy') as f:
    for name, file in index.items():
      with safe_open(folder / 'out' / file, 'numpy') as g:
        np.testing.assert_array_equal(f.get_tensor(name), g.get_tensor(name))
  card = (folder / 'out/README.md').read_text()
  assert 'license: "apache-2.0"' in card and 'val/loss' in card and 'from_pretrained' in card
  written = json.loads((folder / 'out/config.json').read_text())
  assert written['architectures'] == ['LlamaForCausalLM'] and isinstance(written['bos_token_id'], int)
  assert (folder / 'run/exported/step_2/model.safetensors').is_file()


def test_the_license_of_the_source_is_in_the_model_card(folder, tmp_path):
  """By way of other runs too; a named license comes first."""
  published, config = tmp_path / 'origin', Config()
  published.mkdir()
  (published / 'config.json').write_text('{"model_type": "llama"}')
  first = tmp_path / 'first'
  first.mkdir()
  (first / 'config.json').write_text(json.dumps({'start': {'run': str(published)}}))
  tuned = dataclasses.replace(config, start=StartConfig(run=str(first)))
  front = ['---', 'license: "other"  # see below', 'license_name: llama3.2', "license_link: 'LICENSE.txt'", 'tags:',
           '- x', '---', 'license: mit']
  assert origin_of(tuned, first) == ('origin', {}, True)
  (published / 'README.md').write_text('\n'.join(front))
  found = {'license': 'other', 'license_name': 'llama3.2', 'license_link': 'LICENSE.txt'}
  assert origin_of(tuned, first) == origin_of(config, published) == ('origin', found, True)
  assert origin_of(config, first) is None
  gone = dataclasses.replace(config, start=StartConfig(run=str(tmp_path / 'gone')))
  assert origin_of(gone, first) == ('gone', {}, False)
  for text, license_name in (('---\r\nlicense:\r\n- apache-2.0\r\n---\r\n', 'apache-2.0'), ('license: mit\n', None),
                             ('---\ntitle: x\nlicense: [mit]\n---', 'mit'), ('---\nlicense:\n---\n', None)):
    (published / 'README.md').write_text(text, newline='')
    assert license_of(published).get('license') == license_name
  run = load_run(folder / 'model', make_mesh(MeshConfig(), jax.devices()[:1]))
  (published / 'README.md').write_text('\n'.join(front))
  for name, values, expected in (
      ('a', {}, 'license_name: "llama3.2"'), ('b', {'license_name': 'mit'}, 'license: "mit"'),
      ('c', {'run': dataclasses.replace(run, config=dataclasses.replace(run.config, start=gone.start))},
       'could not be read')):
    write_model(**{'run': run, 'folder': tmp_path / name, 'source': tmp_path if name == 'c' else published} | values)
    assert expected in (tmp_path / name / 'README.md').read_text()
  assert 'llama3.2' not in (tmp_path / 'b/README.md').read_text()


def test_a_folder_that_differs_from_transformers_is_not_kept(folder, monkeypatch):
  """A stand-in for transformers that computes something else, as the test extra lacks PyTorch."""
  class Other:
    def logits(self, tokens):
      return np.ones((*tokens.shape, 300), np.float32)

  monkeypatch.setattr('llm_jax.hf.export.can_check', lambda: True)
  monkeypatch.setattr(check, 'can_check', lambda: True)
  monkeypatch.setattr(check, '_open', lambda folder: Other())
  with pytest.raises(check.MismatchError) as error:
    export.main([f'--workdir={folder}/model', f'--out={folder}/bad', '--format=hf'])
  assert error.value.exit_code == 70
  assert not [path for path in folder.iterdir() if path.name.startswith('bad')]


def test_a_folder_with_a_sentencepiece_model_alone_is_used_and_exported(folder, tmp_path, capsys):
  sentencepiece = pytest.importorskip('sentencepiece')
  shutil.copytree(folder / 'model', tmp_path / 'in')
  (tmp_path / 'in/tokenizer.json').unlink()
  with open(tmp_path / 'in/tokenizer.model', 'wb') as f:
    text = '\n'.join(path.read_text() for path in sorted((folder / 'corpus').iterdir()))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.splitlines()), model_writer=f, vocab_size=290,
                                             minloglevel=2)
  for begins in (True, False):
    (tmp_path / 'in/tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'LlamaTokenizer',
                                                                   'add_bos_token': begins}))
    generate.main([f'--workdir={tmp_path}/in', '--prompt=def ', '--num_tokens=4', '--temperature=0'])
    assert 'def' in capsys.readouterr().out
    out = tmp_path / f'out{begins}'
    export.main([f'--workdir={tmp_path}/in', f'--out={out}', '--format=hf', '--check=never'])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    one, two = load_run(tmp_path / 'in', mesh), load_run(out, mesh)
    assert prompt_ids(one.config, one.tokenizer, ['def f']) == prompt_ids(two.config, two.tokenizer, ['def f'])
    assert (prompt_ids(two.config, two.tokenizer, ['def f'])[0][0] == two.tokenizer.bos_id) == begins


def test_messages_of_the_callback_name_the_config_field(folder, tmp_path):
  model = load_run(folder / 'model', make_mesh(MeshConfig(), jax.devices()[:1])).config.model
  for where, expected in (('config.checkpoint.export_every', 'config.checkpoint.export_every: no family'),
                          (None, 'config.log.callbacks: no family')):
    with pytest.raises(ConfigError, match=expected):
      ExportModel(model=dataclasses.replace(model, parallel_residual=True), where=where)
  config = with_named_callbacks(Custom(), dataclasses.replace(Config(), checkpoint=CheckpointConfig(export_every=100)))
  assert config.callbacks[-1]._where == 'config.checkpoint.export_every'

  class Own:
    bos_id = eos_id = 0
    token_bytes = (b'',)

    def to_json(self):
      return '{"type": "own"}'

  session = SimpleNamespace(config=Config(), program=SimpleNamespace(data=SimpleNamespace(tokenizer=Own())))
  with pytest.raises(ConfigError, match=r'^config\.log\.callbacks: a tokenizer of type own'):
    ExportModel()(SimpleNamespace(session=session, step=1))
  with pytest.raises(ConfigError, match=r'config\.start\.check: compares') if not check.can_check() else nullcontext():
    importer_of(folder / 'model').check(folder / 'model', 'always')
  (tmp_path / 'file').write_text('')
  run = load_run(folder / 'model', make_mesh(MeshConfig(), jax.devices()[:1]))
  with pytest.raises(StorageError, match=r'^config\.x: '):
    write_model(run, tmp_path / 'file/out', where='config.x')


def test_flags_of_the_other_format_are_refused(folder):
  for flags in (['--dtype=bfloat16'], ['--format=hf', '--weight_bits=32'], ['--format=hf', '--max_shard=5 apples'],
                ['--format=hf', '--family=lama']):
    with pytest.raises(ConfigError, match=flags[-1].partition('=')[0]):
      export.main([f'--workdir={folder}/model', f'--out={folder}/never', *flags])
  assert parse_size('1.5 MB') == 1_500_000


def test_config_from_prints_a_file_that_can_be_trained(folder, capsys):
  config_fields.main([f'--from={folder}/model'])
  path = folder / 'tune.py'
  path.write_text(capsys.readouterr().out)
  config_fields.main([f'--config={path}', f'--config.data.path={folder}/corpus', '--format=json', 'model'])
  assert json.loads(capsys.readouterr().out)['model.norm']['value'] == 'rms_norm'


def test_a_model_without_biases_becomes_gpt2_with_biases_of_zero(tmp_path):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  model = DecoderConfig(vocab_size=67, max_len=16, num_layers=2, embed_dim=32, num_heads=2, dtype='float32')
  config = Config(model=model, data=DataConfig(path='', tokenizer='none', seq_len=16), batch_tokens=16,
                  tokens_per_device=16)
  model, abstract = abstract_of(config.model, mesh)
  params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), abstract)
  assert 'GPT2LMHeadModel' in write_model(Loaded(config, None, None, model, params, {'step': 3}), tmp_path / 'out')
  with jax.set_mesh(mesh):
    back = load_run(tmp_path / 'out', mesh)
    assert back.config.model.use_bias
    batch = batch_of(np.random.default_rng(0).integers(0, 67, (2, 16)))
    model_32 = make_model(dataclasses.replace(back.config.model, dtype='float32'))
    wanted, got = (jax.jit(lambda p, m=m: m.apply({'params': p}, batch))(params)
                   for m, params in ((model, params), (model_32, back.params)))
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)

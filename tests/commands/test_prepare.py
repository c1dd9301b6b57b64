"""`data prepare` makes the stores of a run in advance, once; `data inspect` shows what a run would learn."""

import json
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
from program import environment, write_config

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.commands import data_prepare as prepare
from llm_jax.extras.commands import data_inspect as inspect

TEXTS = [f'Question {i}: what comes after {i}? It is {i + 1}.' for i in range(60)]
INSPECT = ['--tokenizer=byte', '--split=document', '--val_fraction=0.2', '--seq_len=64', '--rows=60']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i, text in enumerate(TEXTS):
    (folder / f'{i:02}.txt').write_text(text)
  return folder


@pytest.fixture
def pairs(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'{i} + 1 =', 'completion': f' {i + 1}'}) + '\n' for i in range(60)))
  return path


def run(folder, module, *flags):
  return subprocess.run([sys.executable, '-m', 'llm_jax', 'data', module, *flags], cwd=folder, env=environment(folder),
                        capture_output=True, text=True, timeout=120)


def state(cache):
  """Bytes and modification time of every file of the stores and tokenizers, without locks."""
  return {path: (path.read_bytes(), path.stat().st_mtime_ns) for kind in ('stores', 'tokenizers')
          for path in (cache / kind).rglob('*') if path.is_file() and path.suffix not in ('.lock', '.used')}


def numbers(out, row):
  """The numbers in a row of the table."""
  line = next(line for line in out.splitlines() if line.startswith(row))
  return [float(word.replace(',', '')) for word in line.split()[1:]]


def test_the_prepare_command_makes_stores_once(tmp_path, corpus, cache):
  flags = ('--path=corpus', '--tokenizer=bpe', '--vocab_size=300', '--split=document', '--val_fraction=0.2')
  first = run(tmp_path, 'prepare', *flags)
  assert first.returncode == 0, first.stderr
  assert 'error' not in first.stderr
  assert '60 documents in: 60 kept, 0 dropped' in first.stdout
  rows = [numbers(first.stdout, f'{split}/data') for split in ('train', 'val')]
  documents, tokens, num_bytes = (sum(row[i] for row in rows) for i in range(3))
  assert (documents, num_bytes) == (60, sum(map(len, TEXTS)))
  assert all(row[3] == pytest.approx(row[2] / row[1], abs=1e-3) for row in rows)
  assert 60 < tokens < num_bytes, 'bpe makes fewer tokens than bytes'
  assert 'vocabulary: 300 tokens' in first.stdout

  before = state(cache)
  second = run(tmp_path, 'prepare', *flags)
  assert second.returncode == 0 and second.stderr == 'reading data ...\n', second.stderr
  assert [numbers(second.stdout, f'{split}/data') for split in ('train', 'val')] == rows
  assert state(cache) == before
  seconds = float(second.stdout.split('ready in ')[1].split(' s')[0])
  assert seconds < 1, 'the store was made twice'


def test_a_changed_file_or_option_makes_another_store(corpus, cache, capsys):
  flags = [f'--path={corpus}', '--tokenizer=byte', '--val_fraction=0.2']
  prepare.main(flags)
  once = {p for p in (cache / 'stores').iterdir() if p.is_dir()}
  prepare.main([*flags, '--filters.min_chars=42'])
  (corpus / 'new.txt').write_text('one more')
  prepare.main(flags)
  stores = {p for p in (cache / 'stores').iterdir() if p.is_dir()}
  assert len(once) == 1 and len(stores) == 3 and once < stores
  assert '61 documents in: 61 kept' in capsys.readouterr().out


def test_prepare_makes_the_stores_that_the_run_opens(tmp_path, cache, capsys):
  from llm_jax.config_file import open_config
  from llm_jax.data.open import open_data
  path = write_config(tmp_path)
  prepare.main([f'--config={path}', '--config.data.val_fraction=0.3'])
  out = capsys.readouterr().out
  before = state(cache)
  config = open_config(path).resolve({'data.val_fraction': '0.3'}, cpu_only=True)
  data = open_data(config.data)
  assert state(cache) == before, 'open_data must use the prepared stores'
  assert numbers(out, 'train/data')[1] == len(data.train['data'].tokens)
  assert numbers(out, 'val/data')[2] / (numbers(out, 'train/data')[2] + numbers(out, 'val/data')[2]) == pytest.approx(
      0.3, abs=0.01)


def test_the_table_has_a_row_for_each_source(corpus, pairs, capsys):
  prepare.main(['--tokenizer=byte', f'--sources.prose.path={corpus}', f'--sources.sums.path={pairs}',
                '--sources.sums.field=prompt', '--split=document', '--val_fraction=0.2'])
  out = capsys.readouterr().out
  totals = {name: sum(numbers(out, f'{split}/{name}')[0] for split in ('train', 'val')) for name in ('prose', 'sums')}
  assert totals == {'prose': 60, 'sums': 60}


@pytest.mark.parametrize('command', [prepare, inspect])
@pytest.mark.parametrize('flags, words', [
    (['--path={corpus}', '--pth=x'], ['--pth: no such field', 'did you mean --path']),
    (['--path={corpus}', '--seq_len=0', '--val_fraction=2'], ['seq_len', 'val_fraction']),  # one message for both
    (['--path={corpus}', '--packing=tight'], ["'tight'", 'best_fit']),
    (['--path={corpus}', '--seq_len=many'], ['--seq_len', "'many'"]),
    (['--path={corpus}', '--task=sumarize'], ["'sumarize' is unknown", 'seq2seq']),
    (['--path={corpus}', 'corpus'], ['did you mean --path=corpus?']),
    (['--path={corpus}', '--seq_len'], ['--seq_len: has no value']),
    (['--seq_len=8'], ['--path: give a file']),
    ([], ['--path: give a file']),
    (['--config={corpus}/none.py'], ['none.py']),
    (['--path={corpus}', '--max_bad_fraction=-1'], ['max_bad_fraction']),
    (['--path={corpus}', '--sources.a.pth=x'], ['--sources.a.pth']),
])
def test_bad_flags_are_rejected(command, flags, words, corpus):
  with pytest.raises(ConfigError) as e:
    command.main([flag.replace('{corpus}', str(corpus)) for flag in flags])
  assert [word for word in words if word not in str(e.value)] == [], str(e.value)


@pytest.mark.parametrize('module', ['prepare', 'inspect'])
def test_the_program_rejects_a_bad_flag(module, tmp_path, corpus):
  begin = time.perf_counter()
  result = run(tmp_path, module, '--path=corpus', '--seq_length=8')
  assert result.returncode == 78
  assert result.stderr == 'error: --seq_length: no such field; did you mean --seq_len?\n'
  assert time.perf_counter() - begin < 5


@pytest.mark.parametrize('module', ['prepare', 'inspect'])
def test_help_shows_the_usage(module, tmp_path):
  result = run(tmp_path, module, '--help')
  assert result.returncode == 0 and '--config' in result.stdout and '--path' in result.stdout


def test_an_unwritable_cache_is_an_error(tmp_path, corpus):
  (tmp_path / 'file').write_text('')
  with pytest.raises(StorageError, match='LLM_JAX_CACHE'):
    prepare.main([f'--path={corpus}', '--tokenizer=byte', f'--cache_dir={tmp_path}/file'])


def shown(out):
  """{row: its lines} in the output of inspect."""
  rows = {}
  for line in out.splitlines():
    if line.startswith('row '):
      lines = rows.setdefault(int(line.split()[1]), [])
    elif rows and line.startswith('  '):
      lines.append(line.lstrip())
  return rows


def tokens_of(lines, label):
  """The tokens printed after 'reads' or 'learns'; the first may be a space."""
  return next(line for line in lines if line.startswith(label)).removeprefix(label.ljust(8)).split('|')


def test_inspect_shows_inputs_and_targets(corpus, capsys):
  inspect.main([f'--path={corpus}', *INSPECT, '--packing=pad'])
  out = capsys.readouterr().out
  rows = shown(out)
  documents = int(numbers(out, 'train/data')[0])
  assert 30 < len(rows) == documents and f'{documents} rows of 64 tokens, task next_token, packing pad' in out
  for lines in rows.values():
    reads, learns = tokens_of(lines, 'reads'), tokens_of(lines, 'learns')
    document = ''.join(learns).removesuffix('<eot>')
    assert document in TEXTS
    assert reads == ['<eot>', *document] and learns == [*document, '<eot>']
    assert f'padding: {64 - len(reads)}' in lines


def test_inspect_counts_lengths(corpus, capsys):
  (corpus / 'long.txt').write_text('x' * 900)
  (corpus / 'short.txt').write_text('y')
  inspect.main([f'--path={corpus}', '--tokenizer=byte', '--val_path', str(corpus / '00.txt'), '--rows=1'])
  out = capsys.readouterr().out
  bars = {int(line.split()[2].replace(',', '')): int(line.split()[-1]) for line in out.splitlines()
          if line.lstrip().startswith('up to')}
  lengths = [len(text) + 1 for text in TEXTS[1:]] + [901, 2]  # 00.txt is for validation
  assert bars == {power: sum(power // 2 < n <= power for n in lengths) for power in (1 << k for k in range(1, 11))}
  assert f'median {int(np.median(lengths)):>12}' in out and 'longest 901' in out


def test_inspect_shows_what_filters_dropped(corpus, capsys):
  (corpus / 'copy.txt').write_text(TEXTS[0])
  (corpus / 'short.txt').write_text('y')
  inspect.main([f'--path={corpus}', *INSPECT, '--filters.min_chars=5', '--filters.deduplicate=True'])
  out = capsys.readouterr().out
  assert '62 documents in: 60 kept, 2 dropped' in out
  assert 'dropped by min_chars' in out and 'dropped by duplicate' in out


def test_inspect_shows_the_middle_between_sentinels(corpus, capsys):
  inspect.main([f'--path={corpus}', *INSPECT, '--task=fim', '--fim.rate=1.0', '--fim.spm_rate=0.0', '--packing=pad'])
  rows = shown(capsys.readouterr().out)
  for lines in rows.values():
    learns = tokens_of(lines, 'learns')
    assert learns[0] == '<sentinel 0>' and learns[-1] == '<eot>'
    cuts = [learns.index(f'<sentinel {k}>') for k in range(3)]
    prefix, suffix, middle = (''.join(learns[a + 1:b]) for a, b in zip(cuts, [*cuts[1:], -1], strict=True))
    assert prefix + middle + suffix in TEXTS
  assert len(rows) > 10


def test_inspect_shows_that_only_answers_are_targets(pairs, capsys):
  inspect.main([f'--path={pairs}', *INSPECT, '--task=prompt_answer', '--packing=pad'])
  rows = shown(capsys.readouterr().out)
  for lines in rows.values():
    reads, learns = tokens_of(lines, 'reads'), tokens_of(lines, 'learns')
    number = int(''.join(reads).removeprefix('<eot>').split()[0])
    assert ''.join(reads) == f'<eot>{number} + 1 = {number + 1}' and ''.join(learns) == f' {number + 1}<eot>'
  assert len(rows) > 10


def test_inspect_shows_both_sides_of_a_pair(pairs, capsys):
  inspect.main([f'--path={pairs}', *INSPECT, '--task=seq2seq', '--packing=pad', '--encoder_len=32'])
  rows = shown(capsys.readouterr().out)
  for lines in rows.values():
    encoder = next(line.split(': ', 1)[1] for line in lines if line.startswith('encoder reads'))
    learns = tokens_of(lines, 'learns')
    number = int(encoder.replace('|', '').split()[0])
    assert encoder.replace('|', '') == f'{number} + 1 =<eot>' and ''.join(learns) == f' {number + 1}<eot>'


def test_inspect_shows_labels(tmp_path, capsys):
  path = tmp_path / 'labelled.jsonl'
  path.write_text(''.join(json.dumps({'text': text, 'label': i % 3}) + '\n' for i, text in enumerate(TEXTS)))
  inspect.main([f'--path={path}', *INSPECT, '--task=classification', '--packing=pad', '--label_field=label'])
  for lines in shown(capsys.readouterr().out).values():
    text = ''.join(tokens_of(lines, 'reads')).replace('<eot>', '')
    assert f'learns the label {TEXTS.index(text) % 3}' in lines


def test_inspect_draws_a_picture(tmp_path, corpus, capsys):
  out = tmp_path / 'data.png'
  inspect.main([f'--path={corpus}', *INSPECT, '--packing=best_fit', f'--out={out}'])
  assert f'wrote {out}' in capsys.readouterr().out
  image = matplotlib.image.imread(out)
  assert min(image.shape[:2]) > 300
  colours = {tuple(colour) for colour in np.round(image[::3, ::3, :3].reshape(-1, 3), 2).tolist()}
  assert len(colours) > 10, 'a blank page has one'


def test_inspect_reports_an_unwritable_picture(tmp_path, corpus):
  for name in ('none/data.png', 'data.unknown'):
    with pytest.raises(StorageError, match='--out'):
      inspect.main([f'--path={corpus}', *INSPECT, f'--out={tmp_path / name}'])


def test_inspect_rejects_an_empty_split(corpus):
  with pytest.raises(ConfigError, match='--part: test is empty'):
    inspect.main([f'--path={corpus}', '--tokenizer=byte', '--part=test'])


def test_inspect_rejects_streams_and_bad_flags(corpus):
  with pytest.raises(ConfigError, match='streaming'):
    inspect.main([f'--path={corpus}', *INSPECT, '--streaming=True'])
  for flag in ('--rows=-1', '--seed=-1', '--rows=few', '--part=middle'):
    with pytest.raises(ConfigError, match=flag.split('=')[0]):
      inspect.main([f'--path={corpus}', *INSPECT[:-1], flag])

"""Pickles of plain data become Parquet; all others give one message, and none of their code is run."""

import collections
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.base.errors import ConfigError, DataError, UserError
from llm_jax.data.sources.documents import File, SourceConfig
from llm_jax.extras.commands import convert
from llm_jax.extras.formats.columnar import parquet
from llm_jax.extras.formats.pickles import load_plain, pickle_refused

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def main(argv):
  """The exit code of the command; its message goes to stderr."""
  try:
    convert.main(argv)
  except UserError as e:
    print(e, file=sys.stderr)
    return e.exit_code
  return 0


def dump(path, value, protocol=None):
  path.write_bytes(pickle.dumps(value, protocol))
  return path


def documents(path, **config):
  return list(parquet(File(path.name, path), SourceConfig(**config)))


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_plain_values_become_parquet(protocol, tmp_path):
  texts = ['one', 'zwei é\r\n', '𝄞', '']
  ids = [np.array([1, 2, 3], dtype) for dtype in (np.uint16, '>i4', np.int64)]
  scalars = [{'text': t, 'label': np.float32(i), 'n': np.int64(i)} for i, t in enumerate(texts)]
  for i, (value, config, found, label) in enumerate([
      (texts, {}, texts, None),
      ([{'text': t, 'n': i} for i, t in enumerate(texts)], {'label_field': 'n'}, texts, [0, 1, 2, 3]),
      (scalars, {'label_field': 'label'}, texts, [0, 1, 2, 3]),
      ([collections.OrderedDict(text=t) for t in texts], {}, texts, None),
      ({'text': texts, 'n': np.arange(4)}, {'label_field': 'n'}, texts, [0, 1, 2, 3]),
      ({'text': np.array(texts, object), 'b': [b'x'] * 4}, {'field': 'text'}, texts, None),
      (np.array(texts), {}, texts, None),
      ([list(x) for x in ids], {}, ids, None), (ids, {}, ids, None), (np.array([[1, 2, 3]] * 3), {}, ids, None),
  ]):
    out = tmp_path / f'{i}.parquet'
    assert main([str(dump(tmp_path / 'x.pkl', value, protocol)), str(out)]) == 0
    result = documents(out, **config)
    assert [d.text if isinstance(d.text, str) else d.text.tolist() for d in result] == [
        w if isinstance(w, str) else w.tolist() for w in found]
    assert label is None or [d.label for d in result] == label
  out = tmp_path / 'pairs.parquet'
  assert main([str(dump(tmp_path / 'x.pkl', [(t, t * 2) for t in texts], protocol)), str(out)]) == 0
  assert [(d.text, d.answer) for d in documents(out)] == [(t, t * 2) for t in texts]


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('array', [
    np.arange(12.0).reshape(3, 4), np.asfortranarray(np.arange(12).reshape(3, 4)), np.array(['a', 'bc']),
    np.array([True]), np.array([1, 2], '>u2'), np.arange(10)[::2], np.array([b'x', b'yz']),
    np.zeros((0, 3), np.int8)], ids=str)
def test_arrays_come_back_equal(array, protocol, tmp_path):
  found = load_plain(dump(tmp_path / 'x.pkl', [array, array], protocol))
  assert len(found) == 2 and np.asarray(found[0]).shape == array.shape
  np.testing.assert_array_equal(np.asarray(found[1]), array)


def test_pickles_of_numpy_1_are_read(tmp_path):
  """NumPy 1 named its modules numpy.core; replaced by hand, as NumPy 2 no longer writes that name."""
  path = tmp_path / 'x.pkl'
  for value in ([np.arange(3)], [np.int64(3)]):
    path.write_bytes(pickle.dumps(value, 2).replace(b'numpy._core.', b'numpy.core.'))
    np.testing.assert_array_equal(load_plain(path)[0], value[0])


class Payload:
  """Pickles to a call of `function`."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def payloads(marker):
  command = f'touch {marker}'
  return {
      'os.system': Payload(os.system, command),
      'eval': Payload(eval, f'__import__("os").system({command!r})'),
      'getattr': Payload(getattr, 'x', 'upper'),
      'subprocess': Payload(subprocess.check_output, ['touch', str(marker)]),
      'open': Payload(open, str(marker), 'w'),
      'import': Payload(__import__, 'os'),
      'numpy': Payload(np.load, str(marker)),
      'numpy function': Payload(np.save, str(marker), 3),
  }


@pytest.mark.parametrize('protocol', [0, 2, 5])
@pytest.mark.parametrize('name', payloads(''))
def test_payloads_are_not_run(name, protocol, tmp_path, capsys):
  marker = tmp_path / 'marker'
  for wrap in (lambda x: x, lambda x: [{'text': 'fine'}, {'text': x}], lambda x: np.array([x, 'text'], object),
               lambda x: {x: 1} if name != 'numpy' else [x], lambda x: [collections.OrderedDict(text=[('deep', x)])]):
    path = dump(tmp_path / 'x.pkl', wrap(payloads(marker)[name]), protocol)
    assert main([str(path), str(tmp_path / 'out.parquet')]) == DataError.exit_code
    message = capsys.readouterr().err
    assert message.startswith(f'{path}: it asks for ') and message.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.pkl']


def test_unsafe_opcodes_are_rejected(tmp_path):
  """Hand-made pickles: dotted names, codecs that are not encodings, replacements used in unexpected places."""
  for data in (b'cnumpy\nndarray.__class__\n.', b'\x80\x04\x8c\x08builtins\x8c\x08str.join\x93.', b'c__main__\nx\n.',
               b'c_codecs\nencode\n(Vx\nVzip\ntR.', b'cnumpy\nndarray\n(I5\ntR.', b'P1\n.', b'\x82\x01.',
               b'cnumpy\ndtype\n(VO\ntR(I3\nV<\nNNNI-1\nI-1\nI63\ntb.',
               b'cnumpy._core.multiarray\n_reconstruct\n(I0\ntR(I1\n(I1000000000000\ntcnumpy\ndtype\n(Vf8\ntRI00\nVx\ntb.',
               b'cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(VO\ntRVx\ntR.',
               b'c_codecs\nencode\n(N(S"__code__"\nI1\nd\x86b.'):
    path = tmp_path / 'x.pkl'
    path.write_bytes(data)
    assert main([str(path), str(tmp_path / 'out.parquet')]) == DataError.exit_code
  assert not (tmp_path / 'out.parquet').exists()


def test_expanding_pickles_are_rejected(tmp_path, capsys):
  text = 'x' * 1_000_000
  loop = []
  loop.append(loop)
  laughs = ['ha'] * 1000
  for _ in range(6):
    laughs = [laughs] * 1000
  for value, word in (([text] * 100_000, 'expand'), (loop, 'nests'), (laughs, 'expand')):
    path = dump(tmp_path / 'x.pkl', value)
    assert main([str(path), str(tmp_path / 'out.parquet')]) == DataError.exit_code
    assert word in capsys.readouterr().err


def test_unsupported_values_are_rejected(tmp_path, capsys):
  for value in (3, None, [], {}, {'a': 3}, {'a': [1], 'b': [1, 2]}, ['text', 3], [{'a': 'x'}, 'y'], {3: ['x']},
                [{1, 2}], [{'a': 'x'}, {'a': 3}], ['\ud800'], [[2**70]], [np.array([2**63])], [np.array([0.5])],
                np.array(['x']).reshape(1, 1),
                [('a', 'b', 'c')]):
    path = dump(tmp_path / 'x.pkl', value)
    code = main([str(path), str(tmp_path / 'out.parquet')])
    message = capsys.readouterr().err
    assert code == DataError.exit_code and str(path) in message, (value, message)
    assert not (tmp_path / 'out.parquet').exists()


def test_damaged_pickles_are_a_data_error(tmp_path):
  whole = pickle.dumps([{'text': f'text {i}', 'ids': np.arange(i)} for i in range(50)])
  path = tmp_path / 'x.pkl'
  for cut in {*range(20), *range(20, len(whole), len(whole) // 40), len(whole) - 1}:
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r'x\.pkl'):
      load_plain(path)
  path.write_bytes(whole + whole)
  with pytest.raises(DataError, match='more follows'):
    load_plain(path)
  for seed in range(200):
    damaged, rng = bytearray(whole), random.Random(seed)
    damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    try:
      load_plain(path)
    except DataError as e:
      assert 'x.pkl' in str(e)


def test_the_rejection_names_a_working_command(tmp_path):
  """The reader's error names a command, and that command converts the file."""
  path, out = dump(tmp_path / 'x.pkl', ['one', 'two']), tmp_path / 'out.parquet'
  with pytest.raises(DataError, match=r'x\.pkl: pickles are not read, .* llm-jax data convert') as error:
    list(pickle_refused(File('x.pkl', path), SourceConfig()))
  command = str(error.value).split('llm-jax ')[1].split(' reads')[0].replace('OUTPUT.parquet', str(out)).split()
  done = subprocess.run([sys.executable, '-m', 'llm_jax', *command], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
  assert [d.text for d in documents(out)] == ['one', 'two']
  dump(path, Payload(os.system, f'touch {tmp_path}/marker'))
  assert main(command[-2:]) == ConfigError.exit_code  # the output exists
  out.unlink()
  done = subprocess.run([sys.executable, '-m', 'llm_jax', *command], capture_output=True, text=True, timeout=120)
  assert done.returncode == 65 and 'Traceback' not in done.stderr
  assert 'it asks for posix.system' in done.stderr and not (tmp_path / 'marker').exists()

"""Tables, arrays and record files of real libraries: read back equal, truncated at many places, damaged."""

import random
import shutil
import struct
import time
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter

from llm_jax.base.errors import DataError
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.formats.arrays import hdf5, npy, npz
from llm_jax.extras.formats.columnar import arrow, huggingface, parquet
from llm_jax.extras.formats.record_files import arrayrecord, crc32c, masked_crc32c, tfrecord

RANDOM = random.Random(0)
TEXTS = [''.join(RANDOM.choices('abc é\n𝄞"', k=RANDOM.randrange(1, 200))) for _ in range(400)]
IDS = [np.array(RANDOM.choices(range(60_000), k=RANDOM.randrange(1, 50)), np.int64) for _ in range(400)]
FLAT = np.arange(700_000, dtype=np.uint16)
ROWS = np.arange(4000, dtype=np.int32).reshape(400, 10)


def _ipc(new, table):
  def write(path):
    with new(str(path), table.schema) as out:
      out.write_table(table, max_chunksize=100)
  return write


def _hdf5(**data):
  def write(path):
    with h5py.File(path, 'w') as out:
      for name, (values, kinds) in data.items():
        out.create_dataset(name, data=values, **kinds)
  return write


def _records(new):
  def write(path):
    out = new(str(path))
    for value in TEXTS:
      out.write(value.encode())
    out.close()
  return write


class _TfWriter(RecordWriter):
  def __init__(self, path):
    super().__init__(open(path, 'wb'))  # noqa: SIM115 - its close() closes it


def _ragged():
  values = np.empty(len(IDS), object)
  values[:] = IDS
  return values


TABLE = pa.table({'text': TEXTS, 'n': range(400)})
# name of a file -> (reader, writer, contents, config)
WRITERS = {
    'text.parquet': (parquet, lambda p: pa.parquet.write_table(TABLE, p, row_group_size=100), TEXTS, {}),
    'zstd.parquet': (parquet, lambda p: pa.parquet.write_table(TABLE, p, compression='zstd'), TEXTS, {'field': 'text'}),
    'ids.parquet': (parquet, lambda p: pa.parquet.write_table(pa.table({'ids': IDS, 'x': [0.5] * 400}), p), IDS, {}),
    'file.arrow': (arrow, _ipc(pa.ipc.new_file, TABLE), TEXTS, {}),
    'stream.arrow': (arrow, _ipc(pa.ipc.new_stream, TABLE), TEXTS, {}),
    'words.arrow': (arrow, _ipc(pa.ipc.new_file, pa.table({'t': pa.array(TEXTS).dictionary_encode()})), TEXTS, {}),
    'views.arrow': (arrow, _ipc(pa.ipc.new_stream, pa.table({'t': pa.array(TEXTS, pa.string_view())})), TEXTS, {}),
    'large.feather': (arrow, lambda p: pa.feather.write_feather(
        pa.table({'t': pa.array(TEXTS, pa.large_string()), 'i': pa.array(IDS, pa.large_list(pa.uint16()))}), str(p)),
                      IDS, {'field': 'i'}),
    'texts.h5': (hdf5, _hdf5(**{'a/text': (TEXTS, {})}), TEXTS, {}),
    'fixed.h5': (hdf5, _hdf5(t=([t.encode() for t in TEXTS], {})), TEXTS, {}),
    'ragged.h5': (hdf5, _hdf5(t=(_ragged(), {'dtype': h5py.vlen_dtype(np.uint16)}), o=([1], {})), IDS, {'field': 't'}),
    'rows.h5': (hdf5, _hdf5(x=(ROWS, {'compression': 'gzip', 'chunks': (50, 10)})), list(ROWS), {}),
    'flat.h5': (hdf5, _hdf5(x=(FLAT, {})), FLAT, {}),
    'rows.npy': (npy, lambda p: np.save(p, ROWS), list(ROWS), {}),
    'flat.npy': (npy, lambda p: np.save(p, FLAT), FLAT, {}),
    'texts.npy': (npy, lambda p: np.save(p, np.array(TEXTS)), TEXTS, {}),
    'bytes.npy': (npy, lambda p: np.save(p, np.array([t.encode() for t in TEXTS])), TEXTS, {}),
    'flat.npz': (npz, lambda p: np.savez_compressed(p, a=FLAT), FLAT, {}),
    'rows.npz': (npz, lambda p: np.savez(p, a=FLAT, b=ROWS), list(ROWS), {'field': 'b'}),
    'x.array_record': (arrayrecord, _records(lambda p: ArrayRecordWriter(p, 'group_size:8')), TEXTS, {}),
    'x.tfrecord': (tfrecord, _records(_TfWriter), TEXTS, {}),
}


def read(reader, path, **config):
  return list(reader(File(path.name, path), SourceConfig(**config)))


def same(documents, wanted):
  if not all(isinstance(d, Document) for d in documents):
    return False
  if isinstance(wanted, np.ndarray):  # one document, in pieces
    return ([d.continues for d in documents] == [False, *[True] * (len(documents) - 1)] and len(documents) > 1
            and np.array_equal(np.concatenate([d.text for d in documents]), wanted))
  return len(documents) == len(wanted) and all(
      d.text == w if isinstance(w, str) else d.text.dtype == np.int64 and np.array_equal(d.text, w)
      for d, w in zip(documents, wanted, strict=True))


@pytest.mark.parametrize('name', WRITERS)
def test_files_round_trip_and_truncation_is_an_error(name, tmp_path):
  reader, write, wanted, config = WRITERS[name]
  path = tmp_path / name
  write(path)
  documents = read(reader, path, **config)
  assert same(documents, wanted)
  assert len({(d.name, d.continues) for d in documents}) == (2 if isinstance(wanted, np.ndarray) else len(wanted))
  whole = path.read_bytes()
  cuts = {1, 2, 3, 5, 8, 11, 12, 16, 64, *range(50, len(whole), len(whole) // 12)}
  cuts |= {len(whole) - i for i in (1, 2, 7, 9, 30)}
  for cut in cuts if name == 'x.tfrecord' else {0, *cuts}:  # an empty file is a valid TFRecord file
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=str(path)):
      read(reader, path, **config)


# Values of variable length have no checksums in HDF5, and the library itself can hang on damaged ones.
@pytest.mark.parametrize('name', [name for name in WRITERS if name not in ('texts.h5', 'ragged.h5')])
def test_a_flipped_bit_gives_documents_or_a_data_error(name, tmp_path):
  reader, write, _, config = WRITERS[name]
  path = tmp_path / name
  write(path)
  whole = path.read_bytes()
  for seed in range(25):
    rng, damaged = random.Random(seed), bytearray(whole)
    damaged[rng.choice((rng.randrange(len(whole)), rng.randrange(min(200, len(whole)))))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    try:
      assert all(isinstance(d, Document | BadRecord) for d in read(reader, path, **config))
    except DataError as e:
      assert str(path) in str(e) and '\n' not in str(e)


@pytest.mark.parametrize('reader', sorted({w[0] for w in WRITERS.values()} - {tfrecord}, key=lambda r: r.__name__),
                         ids=lambda r: r.__name__)
def test_a_file_of_another_format_is_an_error(reader, tmp_path):
  path = tmp_path / 'x'
  for data in (b'', b'plain text\n' * 100, bytes(5000), RANDOM.randbytes(5000)):
    path.write_bytes(data)
    with pytest.raises(DataError, match=str(path)):
      read(reader, path)
  with pytest.raises(DataError):
    read(reader, tmp_path / 'missing')


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(), st.text())))
def test_parquet_pairs_round_trip(tmp_path_factory, rows):
  path = tmp_path_factory.getbasetemp() / 'pairs.parquet'
  strings = pa.string()
  pa.parquet.write_table(pa.table({'id': pa.array([0] * len(rows)), 'question': pa.array([a for a, _ in rows], strings),
                                   'answer': pa.array([b for _, b in rows], strings)}), path)
  assert [(d.text, d.answer) for d in read(parquet, path)] == rows


def test_bad_table_rows_are_reported(tmp_path):
  path = tmp_path / 'x.parquet'
  texts = pa.array(['one', None, 'x' * 500]).cast(pa.binary())
  texts = pa.concat_arrays([texts, pa.array([b'\xff'])])
  pa.parquet.write_table(pa.table({'t': texts, 'label': [[0.5], [1.0, 2.0], [1.0], [1.0]]}), path)
  first, *bad = read(parquet, path, max_record_bytes=100, label_field='label')
  assert (first.text, first.label) == ('one', (0.5,))
  assert [b.where for b in bad] == [f'{path}, row {i}' for i in (2, 3, 4)]
  assert all(word in b.why for b, word in zip(bad, ('null', '500 bytes', 'UTF-8 text at byte 0'), strict=True))
  pa.parquet.write_table(pa.table({'ids': [[1, 2], [1, -2], [1, None]]}), path)
  assert [type(d) for d in read(parquet, path)] == [Document, BadRecord, BadRecord]
  pa.parquet.write_table(pa.table({'a': ['x'], 'b': ['y']}), path)
  with pytest.raises(DataError, match='one of a, b'):
    read(parquet, path)
  with pytest.raises(DataError, match=r"no column 'c', but a, b"):
    read(parquet, path, field='c')
  pa.parquet.write_table(pa.table({'a': [1.5]}), path)
  with pytest.raises(DataError, match='a: double'):
    read(parquet, path)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Folders written by the package datasets: a shuffled set in three shards, and a dict of splits."""
  import datasets
  datasets.disable_progress_bars()
  folder = tmp_path_factory.mktemp('saved')
  everything = datasets.Dataset.from_dict({'text': TEXTS, 'n': list(range(400))})
  everything.shuffle(seed=1).save_to_disk(folder / 'shards', num_shards=3)
  datasets.DatasetDict(train=everything, test=everything.select([0])).save_to_disk(folder / 'splits')
  return folder, datasets.load_from_disk(folder / 'shards')['text'][:]


def test_hugging_face_folders_are_read_and_checked(saved, tmp_path):
  folder, shuffled = saved
  documents = read(huggingface, folder / 'shards')
  assert same(documents, shuffled) and documents[-1].name == 'shards:400'
  assert same(read(huggingface, folder / 'splits'), TEXTS)
  damaged = tmp_path / 'shards'
  shutil.copytree(folder / 'shards', damaged)
  shard = sorted(damaged.glob('*.arrow'))[1]
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(DataError, match=shard.name):
    read(huggingface, damaged)
  shard.unlink()
  with pytest.raises(DataError, match=shard.name):
    read(huggingface, damaged)
  (damaged / 'state.json').write_text('{"_data_files": 3}')
  with pytest.raises(DataError, match=r'state\.json'):
    read(huggingface, damaged)
  with pytest.raises(DataError, match='save_to_disk'):
    read(huggingface, tmp_path / 'missing')


def test_an_unreachable_hub_is_reported_within_seconds(monkeypatch, tmp_path):
  monkeypatch.setenv('HF_ENDPOINT', 'https://hub.invalid')
  for proxy in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
    monkeypatch.delenv(proxy, raising=False)
  begin = time.monotonic()
  with pytest.raises(DataError, match=r'hf:someone/something: .* save_to_disk'):
    list(huggingface(File('hf:someone/something', tmp_path), SourceConfig()))
  assert time.monotonic() - begin < 10


@pytest.mark.parametrize('array, word', [
    (np.array([1.5]), 'float64'), (np.array([{}], object), 'unpickling'), (np.zeros((2, 2, 2), int), r'\[2, 2, 2\]'),
    (np.asfortranarray(ROWS), 'Fortran'), (np.array(3), 'int64'), (np.zeros(2, [('a', int)]), 'must hold integers')])
def test_unsupported_arrays_are_an_error(array, word, tmp_path):
  np.save(tmp_path / 'x.npy', array, allow_pickle=True)
  np.savez(tmp_path / 'x.npz', allow_pickle=True, a=array)
  for reader, name in ((npy, 'x.npy'), (npz, 'x.npz')):
    with pytest.raises(DataError, match=word):
      read(reader, tmp_path / name)


def test_negative_ids_are_bad_records(tmp_path):
  np.save(tmp_path / 'x.npy', np.array([[1, 2], [3, -4]]))
  document, bad = read(npy, tmp_path / 'x.npy')
  assert document.text.tolist() == [1, 2] and '-4' in bad.why and bad.where.endswith('row 2')
  np.save(tmp_path / 'y.npy', np.array([1, -4]))
  assert '-4' in read(npy, tmp_path / 'y.npy')[0].why


def test_bombs_and_ambiguous_members_are_errors(tmp_path):
  np.savez_compressed(tmp_path / 'x.npz', a=np.zeros(30 << 20, np.uint8))
  with pytest.raises(DataError, match='bomb'):
    read(npz, tmp_path / 'x.npz')
  np.savez(tmp_path / 'x.npz', a=FLAT, b=FLAT)
  with pytest.raises(DataError, match='a, b'):
    read(npz, tmp_path / 'x.npz')
  with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive:
    archive.writestr('../../a.npy', 'no array')
  with pytest.raises(DataError, match=r'x\.npz'):
    read(npz, tmp_path / 'x.npz')
  with h5py.File(tmp_path / 'x.h5', 'w') as out:
    out.create_dataset('zeros', data=np.zeros(30 << 20, np.uint8), compression='gzip')
    out.create_dataset('unwritten', (1 << 40,), np.uint8, chunks=(1 << 20,))
    out.create_dataset('elsewhere', (10,), np.uint8, external=[('/etc/passwd', 0, 10)])
    out['link'] = h5py.ExternalLink(str(tmp_path / 'y.h5'), 'x')
  with h5py.File(tmp_path / 'y.h5', 'w') as out:
    out['x'] = np.arange(10)
  for field, word in (('zeros', 'bomb'), ('unwritten', 'never written'), ('elsewhere', 'another file'),
                      ('link', 'no .link'), (None, 'holds 3 arrays')):
    with pytest.raises(DataError, match=word):
      read(hdf5, tmp_path / 'x.h5', field=field)


def _varint(n):
  return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


def _field(number, data):
  return _varint(number << 3 | 2) + _varint(len(data)) + data


def _example(**features):
  """A tf.train.Example, encoded by hand, independently of the reader."""
  entries = b''
  for name, value in features.items():
    if isinstance(value, str):
      feature = _field(1, _field(1, value.encode()))
    elif isinstance(value, float):
      feature = _field(2, _field(1, struct.pack('<f', value)))
    else:
      feature = _field(3, _field(1, b''.join(map(_varint, value))))
    entries += _field(1, _field(1, name.encode()) + _field(2, feature))
  return _field(1, entries)


def _write_tf(path, records):
  writer = _TfWriter(path)
  for record in records:
    writer.write(record)
  writer.close()


def test_the_first_tfrecord_determines_the_kind(tmp_path):
  path = tmp_path / 'x.tfrecord'
  _write_tf(path, [_example(text=t, score=0.5, n=[3]) for t in TEXTS])
  documents = read(tfrecord, path, label_field='score')
  assert same(documents, TEXTS) and {d.label for d in documents} == {0.5}
  _write_tf(path, [_example(ids=list(map(int, ids))) for ids in IDS])
  assert same(read(tfrecord, path), IDS)
  _write_tf(path, [b'{"prompt": "a", "completion": "b"}', b'{"prompt": ', b'plain'])
  document, *bad = read(tfrecord, path)
  assert (document.text, document.answer) == ('a', 'b') and [type(b) for b in bad] == [BadRecord] * 2
  _write_tf(path, [b'plain', b'{"text": "x"}', b'\xff', b'y' * 200, _example(text='z')])
  documents = read(tfrecord, path, max_record_bytes=100)
  last = _example(text='z').decode()
  assert [getattr(d, 'text', None) for d in documents] == ['plain', '{"text": "x"}', None, None, last]
  assert documents[2].where == f'{path}, record 3'


def test_tfrecord_checksums_are_right(tmp_path):
  assert crc32c(b'123456789') == 0xE3069283  # the check value of RFC 3720's polynomial
  assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b'') == 0  # RFC 3720, B.4
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as theirs
  for size in (1, 3, 4, 5, 4095, 4096, 4097, 4099, 9000):
    data = random.Random(size).randbytes(size)
    assert masked_crc32c(data) == theirs(data)

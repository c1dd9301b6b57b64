"""The bad-data corpus: broken, hostile or mislabelled inputs, each with the words that its error must contain.

`BAD` must be rejected. `BAD_RECORDS` hold the good documents TEXTS too, and bad records that may be skipped. `WHOLE`
are good inputs, which tests damage. Real libraries write all files during the tests; none is stored in the repository.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import pickle
import tarfile

import numpy as np
from bad_files import (
  PROSE,
  TEXTS,
  Make,
  amid,
  arrayrecord,
  arrow,
  beside,
  bomb,
  cut,
  damaged,
  database,
  encrypted,
  hdf5,
  hdf5_bomb,
  hdf5_length,
  lines,
  llmc,
  megatron,
  npy,
  npz,
  parquet,
  payload,
  payload_npy,
  payload_npz,
  raw,
  renamed,
  saved_dataset,
  tarred,
  tfrecord,
  within,
  zipped,
  zst,
)


@dataclasses.dataclass(frozen=True)
class BadRecords:
  """An input that holds TEXTS and some bad records, and the words of the message for the first."""

  make: Make
  num_bad: int
  words: tuple[str, ...]
  flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bad:
  """An input, the flags to use with it, and the words that its one message must contain."""

  make: Make
  words: tuple[str, ...]
  flags: tuple[str, ...] = ()
  code: int = 65  # 78: the flags are wrong
  command: str = 'prepare'


PDF = b'%PDF-1.7\n%\xe2\xe3\xcf\xd3\n'
_PAIRS = [{'prompt': text, 'answer': str(i)} for i, text in enumerate(TEXTS)]
_LABELLED = [{'text': text, 'label': i % 3} for i, text in enumerate(TEXTS)]
_DEEP = '{"text": "x", "more": ' + '[' * 100_000 + ']' * 100_000 + '}'
_TABLE = ('CREATE TABLE t (body TEXT, n INTEGER)', [])
_ROWS = ('INSERT INTO t VALUES (?, ?)', [(text, i) for i, text in enumerate(TEXTS)])
_IDS = np.arange(400).astype(np.int32)
_JSONL = lines('data.jsonl', amid())
_CSV_ROWS = [f'"{text}",{i}\n' for i, text in enumerate(TEXTS)]
_CSV = raw('data.csv', ''.join(['text,n\n', *_CSV_ROWS]))
_AMID_BYTES = [*(text.encode() for text in TEXTS[:6]), b'caf\xe9', *(text.encode() for text in TEXTS[6:])]
_SEQ2SEQ = ('--task=seq2seq', '--encoder_len=32', '--seq_len=32', '--packing=pad')

BAD: dict[str, Bad] = {
    # Empty or missing.
    'empty file': Bad(raw('a.txt', ''), ('0 token',)),
    'empty folder': Bad(within(), ('holds no files',)),
    'folder of hidden files': Bad(within(raw('.a', 'x')), ('holds no files',)),
    'folder of empty files': Bad(within(raw('a.txt', ''), raw('b.txt', '')), ('0 token',)),
    'white space alone': Bad(raw('a.txt', ' \n\t\n' * 300), ('white space',)),
    'missing file': Bad(lambda folder: folder / 'nowhere.txt', ('there is no file',)),
    'missing, but near': Bad(lambda f: raw('corpus.txt', PROSE)(f).with_name('corpsu.txt'), ('did you mean',)),
    'glob that matches nothing': Bad(lambda folder: folder / '*.jsonl', ('matches nothing',)),
    'missing val_path': Bad(raw('a.txt', PROSE), ('there is no file',), ('--val_path=/nowhere/b.txt',)),
    'named pipe': Bad(lambda f: os.mkfifo(f / 'a.txt') or f / 'a.txt', ('a pipe to which nothing has written',)),
    'file that cannot be read': Bad(lambda f: (f / 'a.txt').symlink_to('/proc/self/mem') or f / 'a.txt',
                                    ('cannot be read: Input/output error',)),
    'link to nothing': Bad(lambda f: (f / 'a.txt').symlink_to(f / 'gone') or f / 'a.txt',
                           ('link to', 'does not exist')),
    'fewer than two tokens': Bad(raw('a.txt', 'x'), ('needs 2 or more',)),
    'all filtered out': Bad(raw('a.txt', PROSE), ('0 token', '1 (100.00%) dropped by min_chars'),
                            ('--filters.min_chars=1000000',)),
    'jsonl of blank lines': Bad(raw('data.jsonl', '\n\n \n'), ('0 token',)),
    'json array of nothing': Bad(raw('data.json', '[]'), ('0 token',)),
    'parquet of no rows': Bad(parquet({'text': []}, text='string'), ('0 token',)),
    **{f'empty {ending}': Bad(raw(f'data.{ending}', ''), (word,)) for ending, word in {
        'parquet': '0 bytes', 'arrow': 'truncated', 'h5': 'not HDF5', 'npy': 'not an array', 'npz': 'zip',
        'sqlite': 'text column', 'json': '0 token', 'toml': '0 token', 'csv': '0 token', 'tfrecord': '0 token',
        'array_record': 'not ArrayRecord', 'zip': 'truncated', 'tar': 'empty', 'tgz': 'empty', 'zst': 'empty',
        'pkl': 'pickles'}.items()},
    # Not UTF-8 text.
    'invalid UTF-8': Bad(raw('a.txt', PROSE + b'\xff\xfe' + PROSE), (f'byte {len(PROSE)} (ff fe', 'UTF-8')),
    'invalid UTF-8 in a folder': Bad(within(raw('a.txt', PROSE), raw('b.txt', b'ab\xe9')), ('b.txt', 'byte 2')),
    'UTF-8 cut in a character': Bad(raw('a.txt', PROSE + '中'.encode()[:2]), (f'byte {len(PROSE)} ',)),
    'UTF-8 of a surrogate': Bad(raw('a.txt', PROSE + b'\xed\xa0\x80'), (f'byte {len(PROSE)} ',)),
    'UTF-16 without a mark': Bad(raw('a.txt', PROSE.decode().encode('utf-16-le')),
                                 ('UTF-16-LE', 'config.data.encoding')),
    'Latin-1 file': Bad(raw('a.md', 'Grüße\n'.encode('latin1') * 99),
                        ('byte 2 ', 'UTF-8', 'config.data.encoding to cp1252')),
    'Word document': Bad(renamed(zipped({'word/document.xml': PROSE}), 'a.txt'), ('UTF-8',)),
    'gz within gz': Bad(raw('a.txt.gz', gzip.compress(gzip.compress(PROSE))), ('byte 1 ', 'UTF-8')),
    'PDF': Bad(raw('a.pdf', PDF + PROSE), ('byte 10 ', 'UTF-8')),
    'invalid UTF-8, parts': Bad(raw('a.txt', b'one---two---th\xffree' * 9), ('byte 12',), ('--separator=---',)),
    'invalid UTF-8 in jsonl': Bad(lines('data.jsonl', amid(b'{"text": "caf\xe9"}')), ('line 7', 'byte 13')),
    'invalid UTF-8 in csv': Bad(raw('data.csv', b'text\ngood\ncaf\xe9\n'), ('line 3', 'e9')),
    'NUL bytes in jsonl': Bad(lines('data.jsonl', amid(b'\0\0\0\0')), ('line 7', 'malformed')),
    'NUL bytes in csv': Bad(raw('data.csv', b'text,n\n' + b'\0' * 50 + b'\n'), ('line 2',)),
    'zeros named parquet': Bad(raw('data.parquet', bytes(5000)), ('not Parquet',)),
    # JSON.
    'malformed line 7': Bad(lines('data.jsonl', amid('{"text": "cut')), ('line 7', 'malformed JSON', 'character 10')),
    'array on a line': Bad(lines('data.jsonl', amid('["text"]')), ('line 7', 'named fields')),
    'lone surrogate': Bad(lines('data.jsonl', amid(r'{"text": "x\ud800y"}')), ('line 7', 'U+D800')),
    'NaN': Bad(lines('data.jsonl', amid('{"text": NaN}')), ('line 7', 'NaN')),
    'infinity': Bad(lines('data.jsonl', amid('{"text": -Infinity}')), ('line 7', 'Infinity')),
    'text left over': Bad(lines('data.jsonl', [{'prompt': 'a', 'completion': 'b'} | m for m in ({}, {'why': 'z'})]),
                          ('line 2', 'why would be left out', 'config.data.field=prompt')),
    'delimiter in doubt': Bad(raw('data.csv', 'text;n\na, b\nc\n'), ('in doubt', 'config.data.delimiter')),
    'delimiter of two characters': Bad(_CSV, ("'||'", 'one character'), ('--delimiter=||', '--field=text'), 78),
    'duplicate key': Bad(lines('data.jsonl', amid('{"text": "x", "text": "y"}')), ('line 7', "'text'", 'twice')),
    '10 MB line': Bad(lines('data.jsonl', amid({'text': 'x' * 10_000_000})), ('line 7', 'max_record_bytes')),
    '100,000 brackets': Bad(lines('data.jsonl', amid(_DEEP)), ('line 7',)),
    'number of 10,000 digits': Bad(lines('data.jsonl', amid('{"text": %s}' % ('9' * 10_000))), ('line 7',)),
    'wrong field': Bad(_JSONL, ('line 1', "'body' is missing", 'text'), ('--field=body',)),
    'field missing once': Bad(lines('data.jsonl', amid({'txt': 'x'})), ('line 7', "'text' is missing", 'txt')),
    'two string fields': Bad(lines('data.jsonl', [{'title': 'x', 'body': 'y'}]), ('title, body', 'config.data.field')),
    'no string field': Bad(lines('data.jsonl', [{'n': 1.5}] * 9), ('line 1', 'no field holds text')),
    'field of another type': Bad(lines('data.jsonl', amid({'text': 17})), ('line 7', 'int 17')),
    'field null': Bad(lines('data.jsonl', amid({'text': None})), ('line 7', 'null')),
    'floats for ids': Bad(lines('data.jsonl', [{'ids': [1.0, 2.0]}]), ('line 1',), ('--field=ids',)),
    'json of a number': Bad(raw('data.json', '17'), ('named fields',)),
    'json cut in a record': Bad(cut(raw('data.json', json.dumps(amid()))), ('record 25', 'truncated')),
    'json of several objects': Bad(raw('data.json', '{"text": "x"} {"text": "y"}\n'), ('jsonl',)),
    'json after the array': Bad(raw('data.json', '[{"text": "hello"}] {}'), ('more follows',)),
    'json of two lists': Bad(raw('data.json', '{"a": [{"text": "x"}], "b": [{"text": "y"}]}'), ('a, b',)),
    # CSV, TOML.
    'unclosed quote': Bad(raw('data.csv', 'text\n' + 'a b\n' * 9 + '"never closed\n' + 'a b\n' * 9),
                          ('line 11', 'quote')),
    'ragged rows': Bad(raw('data.csv', 'text,n\nx,1\ny,2,3\n'), ('line 3', '3 fields'), ('--field=text',)),
    'row cut off': Bad(cut(_CSV, 0.99), ('line 80', 'quote'), ('--field=text',)),
    'header names twice': Bad(raw('data.csv', 'text,text\na,b\n'), ('line 1', "'text' twice")),
    'two text columns': Bad(raw('data.tsv', 'title\tbody\na\tb\n'), ('title, body',)),
    'TOML syntax': Bad(raw('data.toml', '[[examples]]\ninput = "x"\noutput = \n'), ('line 3', 'malformed TOML')),
    'TOML without tables': Bad(raw('data.toml', 'input = "x"\n'), ('[[examples]]',)),
    # Compressed.
    'truncated gz': Bad(cut(raw('a.txt.gz', gzip.compress(PROSE))), ('at byte', 'truncated')),
    'truncated jsonl.gz': Bad(cut(raw('a.jsonl.gz', gzip.compress(b'{"text": "hello"}\n' * 999))), ('truncated',)),
    'truncated zst': Bad(cut(zst('a.txt.zst', PROSE)), ('at byte', 'truncated')),
    'truncated bz2': Bad(cut(raw('a.txt.bz2', bz2.compress(PROSE))), ('at byte', 'truncated')),
    'truncated xz': Bad(cut(raw('a.txt.xz', lzma.compress(PROSE))), ('at byte', 'truncated')),
    'gz of no bytes': Bad(raw('a.txt.gz', b''), ('empty',)),
    'gz with a wrong checksum': Bad(damaged(raw('a.txt.gz', gzip.compress(PROSE)), -8),
                                    ('at byte', 'damaged', 'check')),
    'damaged xz': Bad(damaged(raw('a.txt.xz', lzma.compress(PROSE))), ('at byte', 'damaged')),
    'text named gz': Bad(raw('a.txt.gz', PROSE), ('named as gzip',)),
    'gz bomb': Bad(bomb('a.txt.gz', gzip.compress), ('bomb',)),
    'zst bomb': Bad(zst('a.jsonl.zst', bytes(1 << 24), times=32), ('bomb',)),
    'bz2 bomb': Bad(bomb('a.txt.bz2', bz2.compress), ('bomb',)),
    'xz bomb': Bad(bomb('a.txt.xz', lambda zeros: lzma.compress(zeros, preset=0)), ('bomb',)),
    # Tables and arrays.
    'truncated parquet': Bad(cut(parquet({'text': TEXTS})), ('truncated',)),
    'damaged parquet': Bad(damaged(parquet({'text': TEXTS}), 0.1), ('damaged',)),
    'parquet without the field': Bad(parquet({'text': TEXTS}), ("no column 'body'", 'text'), ('--field=body',)),
    'parquet without text': Bad(parquet({'n': [1.5, 2.5]}), ('no column holds text', 'n: double')),
    'parquet, one row null': Bad(parquet({'text': [*TEXTS[:6], None, *TEXTS[6:]]}), ('row 7', 'null')),
    'parquet, not UTF-8': Bad(parquet({'text': [b'x', b'caf\xe9']}, text='binary'), ('row 2', 'UTF-8')),
    'truncated arrow': Bad(cut(arrow({'text': TEXTS})), ('truncated',)),
    'arrow stream cut between batches': Bad(cut(arrow({'text': TEXTS}, stream=True), 0.6), ('truncated',)),
    'saved data set, shard gone': Bad(saved_dataset(state__json='{"_data_files": [{"filename": "b.arrow"}]}'),
                                      ('b.arrow', 'no such file')),
    'saved data set, damaged state': Bad(saved_dataset(state__json='{"_data'), ('state.json',)),
    'truncated HDF5': Bad(cut(hdf5(text=TEXTS * 50), 0.8), ('truncated',)),
    'HDF5 without the data set': Bad(hdf5(tokens=_IDS), ("no 'body'", 'tokens'), ('--field=body',)),
    'HDF5 with two data sets': Bad(hdf5(a=_IDS, b=_IDS), ('a, b', 'config.data.field')),
    'HDF5 of floats': Bad(hdf5(tokens=np.ones(9)), ('float64',)),
    'HDF5 with a false length': Bad(hdf5_length, ('length 2147483648', 'at byte')),
    'HDF5 bomb': Bad(hdf5_bomb, ('bomb',)),
    'truncated npy': Bad(cut(npy(_IDS)), ('truncated',)),
    'npy of floats': Bad(npy(np.ones(99)), ('float64',)),
    'npy of negative ids': Bad(npy(np.array([1, 2, -3])), ('-3',)),
    'npy in three dimensions': Bad(npy(np.ones((2, 2, 2), int)), ('[2, 2, 2]',)),
    'npy of a scalar': Bad(npy(np.int32(7)), ('[]',)),
    'npy of objects': Bad(payload_npy, ('unpickling', 'runs code')),
    'npy of no characters': Bad(npy(np.array([ord('a'), 0x110000], np.uint32).view('<U1')),
                                ('item 2', 'not a character')),
    'npz of objects': Bad(payload_npz, ('unpickling', 'runs code')),
    'truncated npz': Bad(cut(npz(tokens=_IDS)), ('truncated',)),
    'npz with two arrays': Bad(npz(a=_IDS, b=_IDS), ('a, b', 'config.data.field')),
    'npz bomb': Bad(npz(compress=True, tokens=np.zeros(1 << 23, np.int32)), ('bomb',)),
    'truncated tfrecord': Bad(cut(tfrecord([t.encode() for t in TEXTS])), ('at byte', 'truncated')),
    'damaged tfrecord': Bad(damaged(tfrecord([PROSE]), 0.5), ('at byte 0', 'checksum')),
    'truncated arrayrecord': Bad(cut(arrayrecord([t.encode() for t in TEXTS])), ('truncated',)),
    'damaged arrayrecord': Bad(damaged(arrayrecord([t.encode() for t in TEXTS]), 0.02), ('damaged',)),
    # Token ids.
    'id beyond the vocabulary': Bad(beside(raw('tok.json', '{"type": "byte"}'),
                                           lines('data.jsonl', [{'ids': [1, 2]}, {'ids': [3, 300]}])),
                                    ('data.jsonl:2', '300', '257'), ('--tokenizer={folder}/tok.json',)),
    '70000 in uint16': Bad(npy(_IDS * 0 + 70000), ('data.npy', '70000', 'uint16'),
                           ('--dtype=uint16', '--tokenizer=none')),
    'negative id in jsonl': Bad(lines('data.jsonl', [{'ids': [1, 2]}, {'ids': [3, -1]}]), ('line 2', '-1')),
    'id beyond 64 bits': Bad(lines('data.jsonl', [{'ids': [2 ** 70]}]), ('line 1', '64 bits')),
    'bin of odd length': Bad(raw('data.bin', bytes(1001)), ('1001 bytes', 'config.data.dtype')),
    'empty bin': Bad(raw('data.bin', b''), ('0 bytes',)),
    'bin of negative ids': Bad(raw('data.bin', np.array([1, 2, -7] * 99, np.int32).tobytes()), ('-7',),
                               ('--dtype=int32', '--tokenizer=none')),
    'bin beyond the vocabulary': Bad(beside(raw('tok.json', '{"type": "byte"}'),
                                            raw('data.bin', np.array([1, 999] * 99, np.uint16).tobytes())),
                                     ('data.bin', '999', '257'), ('--tokenizer={folder}/tok.json',)),
    'int32 as uint16': Bad(raw('data.bin', np.arange(1, 500, dtype=np.int32).tobytes()),
                           ('every second id is 0', 'dtype=int32')),
    'int64 as uint16': Bad(raw('data.bin', np.arange(1, 500, dtype=np.int64).tobytes()), ('dtype=int64',)),
    'int32 beyond uint16 as uint16': Bad(raw('data.bin', np.arange(0, 128_000, 7, dtype=np.int32).tobytes()),
                                         ('every second id is 1 or less', 'dtype=int32')),
    'index without its ids': Bad(raw('data.idx', b'MMIDIDX\0\0' + bytes(40)), ('data.bin is not beside it',)),
    'index of something else': Bad(beside(raw('data.idx', b'something'), raw('data.bin', bytes(range(200)))),
                                   ('data.idx', 'not an index of Megatron')),
    'index of other ids': Bad(beside(raw('data.idx', megatron([3, 4], [0, 2], np.int32)),
                                     raw('data.bin', np.arange(8, dtype=np.int32).tobytes())),
                              ('data.idx', '7 ids of int32', '28 bytes', '32')),
    'truncated index': Bad(beside(cut(raw('data.idx', megatron([3, 4], [0, 2], np.int32)), 0.9),
                                  raw('data.bin', np.arange(7, dtype=np.int32).tobytes())), ('data.idx', 'damaged')),
    'index with false borders': Bad(beside(raw('data.idx', megatron([3, 4], [0, 1], np.int32)),
                                           raw('data.bin', np.arange(7, dtype=np.int32).tobytes())),
                                    ('data.idx', 'borders')),
    'llm.c with a false count': Bad(raw('data.bin', llmc(20240520, 1000, 500)), ('1000 tokens', '2024')),
    'llm.c negative count': Bad(raw('data.bin', llmc(20240520, -500, 500)), ('-500',)),
    'ids, then text': Bad(lines('data.jsonl', [{'text': [1, 2, 3]}, {'text': 'hello there'}] * 20),
                          ('data.jsonl:2', 'holds text', 'no tokenizer'), ('--tokenizer=none',)),
    'text for ids': Bad(_JSONL, ('data.jsonl:1', 'holds text'), ('--tokenizer=none',)),
    # SQLite.
    'truncated SQLite': Bad(cut(database(_TABLE, (_ROWS[0], _ROWS[1] * 99)), 0.55), ('truncated',)),
    'damaged SQLite': Bad(cut(raw('data.db', b'SQLite format 3\0' + bytes(4080)), 1), ('SQLite',)),
    'SQLite without text': Bad(database(('CREATE TABLE t (n INTEGER)', [])), ('text column', 'config.data.query')),
    'query that writes': Bad(database(_TABLE, _ROWS), ('DELETE', 'one SELECT'), ('--query=DELETE FROM t',), 78),
    'query in error': Bad(database(_TABLE, _ROWS), ('syntax', 'one SELECT'), ('--query=SELEKT body FROM t',), 78),
    'query that attaches': Bad(database(_TABLE, _ROWS), ('one SELECT',), ("--query=ATTACH 'x.db' AS y",), 78),
    # Archives.
    'truncated zip': Bad(cut(zipped({'a.txt': PROSE})), ('truncated',)),
    'zip bomb': Bad(zipped({'a.txt': bytes(1 << 25)}), ('a.txt', 'bomb')),
    'zip path traversal': Bad(zipped({'../escaped.txt': PROSE}), ('../escaped.txt', 'leads out')),
    'zip absolute path': Bad(zipped({'/tmp/escaped.txt': PROSE}), ('/tmp/escaped.txt', 'absolute')),
    'zip of a link': Bad(zipped({'a.txt': b'/etc/passwd'}, mode=0o120777), ('a.txt', 'link')),
    'encrypted zip': Bad(encrypted(zipped({'a.txt': PROSE})), ('a.txt', 'encrypted')),
    'zip of nothing': Bad(zipped({}), ('holds no files',)),
    'truncated tar': Bad(cut(tarred('a.txt')), ('truncated',)),
    'truncated tgz': Bad(cut(tarred('a.txt', ending='.tgz')), ('truncated',)),
    'tar path traversal': Bad(tarred('../../escaped.txt'), ('escaped.txt', 'leads out')),
    'tar of a link': Bad(tarred('a.txt', kind=tarfile.SYMTYPE, link='/etc/passwd'), ('a.txt', 'link')),
    'tar of a hard link': Bad(tarred('a.txt', kind=tarfile.LNKTYPE, link='good.txt'), ('a.txt', 'link')),
    'tar of a device': Bad(tarred('a.txt', kind=tarfile.CHRTYPE), ('a.txt', 'device')),
    'bad file in a zip': Bad(zipped({'a.txt': PROSE, 'b/c.txt': b'ab\xff'}), ('data.zip/b/c.txt', 'byte 2')),
    'bad line in a zip': Bad(zipped({'a.jsonl': b'{"text": "x"}\n{"text"'}), ('data.zip/a.jsonl', 'line 2')),
    # Pickles.
    'pickle': Bad(payload('data.pkl'), ('pickles are not read', 'llm-jax data convert')),
    'pickle without an ending': Bad(payload('data'), ('pickles are not read',)),
    'pickle, protocol 0': Bad(payload('data.pickle', 0), ('pickles are not read',)),
    'pickle named txt': Bad(payload('data.txt'), ('byte 0 ', 'UTF-8')),
    'pickle named npy': Bad(payload('data.npy'), ('not an array',)),
    'pickle named json': Bad(payload('data.json'), ('data.json',)),
    'pickle in a zip': Bad(zipped({'data.pkl': pickle.dumps([1])}), ('data.zip/data.pkl', 'pickles are not read')),
    # Answers and labels.
    'answers missing': Bad(_JSONL, ('needs answers', 'answer_field'), ('--task=prompt_answer', '--packing=pad'), 78,
                           'inspect'),
    'answers missing, seq2seq': Bad(_JSONL, ('needs answers',), _SEQ2SEQ, 78, 'inspect'),
    'answer missing once': Bad(lines('data.jsonl', [*_PAIRS[:6], {'prompt': 'x'}, *_PAIRS]),
                               ('line 7', "'answer' is missing"), ('--field=prompt', '--answer_field=answer')),
    'labels missing': Bad(_JSONL, ('needs labels', 'label_field'), ('--task=classification', '--packing=pad'), 78,
                          'inspect'),
    'label missing once': Bad(lines('data.jsonl', [*_LABELLED[:6], {'text': 'x'}, *_LABELLED]),
                              ('line 7', "'label' is missing"), ('--label_field=label',)),
    'prompts that leave no room': Bad(lines('data.jsonl', _PAIRS), ('no row', 'larger config.data.seq_len'),
                                      ('--field=prompt', '--answer_field=answer', '--task=prompt_answer', '--seq_len=8',
                                       '--packing=pad', '--truncate=right'), command='inspect'),
    'label of another width': Bad(lines('data.jsonl', [*_LABELLED, {'text': 'x', 'label': [1, 2]}]),
                                  ('data.jsonl:41', '2 label value'), ('--label_field=label',)),
    'label null': Bad(lines('data.jsonl', [*_LABELLED[:6], {'text': 'x', 'label': None}]), ('line 7', 'null'),
                      ('--label_field=label',)),
    'half a class': Bad(lines('data.jsonl', [{'text': text, 'label': 0.5} for text in TEXTS]), ('0.5', 'whole numbers'),
                        ('--label_field=label', '--task=classification', '--packing=pad'), command='inspect'),
    # Tokenizers.
    'damaged tokenizer.json': Bad(beside(raw('tok.json', '{"type": "char", "ch'), raw('a.txt', PROSE)),
                                  ('tok.json', 'not JSON'), ('--tokenizer={folder}/tok.json',)),
    'tokenizer.json of something else': Bad(beside(raw('tok.json', '{"a": 1}'), raw('a.txt', PROSE)),
                                            ('tok.json', 'not a tokenizer'), ('--tokenizer={folder}/tok.json',)),
    'tokenizer.json without its words': Bad(beside(raw('tok.json', '{"type": "word"}'), raw('a.txt', PROSE)),
                                            ('tok.json', 'not a tokenizer'), ('--tokenizer={folder}/tok.json',)),
    'Hugging Face tokenizer, damaged': Bad(beside(raw('tok.json', '{"model": {"type": "BPE"}}'), raw('a.txt', PROSE)),
                                           ('tok.json', 'not a tokenizer'), ('--tokenizer={folder}/tok.json',)),
    'damaged SentencePiece model': Bad(beside(raw('tok.model', b'\x0a\x0e' + bytes(range(99))), raw('a.txt', PROSE)),
                                       ('tok.model', 'not a SentencePiece'), ('--tokenizer={folder}/tok.model',)),
    'pickle for a model': Bad(beside(payload('tok.model'), raw('a.txt', PROSE)),
                              ('tok.model', 'not a SentencePiece'), ('--tokenizer={folder}/tok.model',)),
    'missing tokenizer.json': Bad(raw('a.txt', PROSE), ('tok.json', 'cannot be read'),
                                  ('--tokenizer={folder}/tok.json',)),
    # Wrong flags.
    'unknown format': Bad(raw('a.txt', PROSE), ("'doc' is unknown", 'jsonl'), ('--format=doc',), 78),
    'format of another file': Bad(raw('a.txt', PROSE), ('not Parquet',), ('--format=parquet',)),
    'unknown tokenizer': Bad(raw('a.txt', PROSE), ("'bte' is unknown", 'byte'), ('--tokenizer=bte',), 78),
    'unknown dtype': Bad(raw('a.bin', bytes(1000)), ("'float32'", 'uint16'), ('--dtype=float32',), 78),
    'sha256 of a file': Bad(raw('a.txt', PROSE), ('not a URL',), (f'--sha256={"0" * 64}',), 78),
}

_FILES = [raw(f'{i:02}.txt', text) for i, text in enumerate(TEXTS)]

BAD_RECORDS: dict[str, BadRecords] = {
    'lines of jsonl': BadRecords(
        lines('data.jsonl', amid('{"text": "cut', '[1]', '17', '{"text": NaN}', '{"text": "a", "text": "b"}',
                                 r'{"text": "\ud800"}', b'{"text": "caf\xe9"}', {'txt': 'x'}, {'text': None}, '\0\0')),
        10, ('line 7', 'malformed JSON')),
    '10 MB line': BadRecords(lines('data.jsonl', amid({'text': 'x' * 10_000_000})), 1, ('line 7', 'max_record_bytes')),
    'first line': BadRecords(lines('data.jsonl', amid('{}', at=0)), 1, ('line 1', 'no field holds text')),
    'last line cut': BadRecords(lines('data.jsonl', amid('{"text": "cu', at=40)), 1, ('line 41', 'malformed')),
    'items of a json array': BadRecords(raw('data.json', json.dumps(amid(17, {'text': 5}))), 2,
                                        ('record 7', 'int 17')),
    'rows of csv': BadRecords(raw('data.csv', ''.join(['text,n\n', *_CSV_ROWS[:6], 'a,b,c\nx\n', *_CSV_ROWS[6:]])), 2,
                              ('line 14', '3 fields'), ('--field=text',)),
    'files of a folder': BadRecords(within(*_FILES, raw('06x.txt', b'ab\xff')), 1, ('06x.txt', 'byte 2')),
    'damaged archive in a folder': BadRecords(within(*_FILES, cut(raw('06x.txt.gz', gzip.compress(PROSE)))), 1,
                                              ('06x.txt.gz', 'truncated')),
    'truncated parquet in a folder': BadRecords(within(*_FILES, cut(parquet({'text': TEXTS}, '06x.parquet'))), 1,
                                                ('06x.parquet', 'truncated')),
    'pickle in a folder': BadRecords(within(*_FILES, payload('06x.pkl')), 1, ('06x.pkl', 'pickles are not read')),
    'parts of a text': BadRecords(raw('data.txt', '---'.join(TEXTS).encode() + b'---ab\xff---'), 1, ('UTF-8',),
                                  ('--separator=---',)),
    'rows of parquet': BadRecords(parquet({'text': [*_AMID_BYTES, None]}, text='binary'), 2, ('row 7', 'UTF-8')),
    'rows of arrow': BadRecords(arrow({'text': [*TEXTS[:6], None, *TEXTS[6:]]}), 1, ('row 7', 'null')),
    'rows of HDF5': BadRecords(hdf5(text=_AMID_BYTES), 1, ('row 7', 'UTF-8')),
    'rows of SQLite': BadRecords(database(_TABLE, ('INSERT INTO t VALUES (NULL, 1)', []), _ROWS), 1,
                                 ('row 1', 'no field')),
    'records of tfrecord': BadRecords(tfrecord(_AMID_BYTES), 1, ('record 7', 'UTF-8')),
    'records of arrayrecord': BadRecords(arrayrecord(_AMID_BYTES), 1, ('record 7', 'UTF-8')),
    'file of a zip': BadRecords(zipped({f'{i}.txt': t.encode() for i, t in enumerate(TEXTS)} | {'x.txt': b'ab\xff'}), 1,
                                ('data.zip/x.txt', 'byte 2')),
}

# Name -> (maker, whether the reader can detect truncation).
WHOLE: dict[str, tuple[Make, bool]] = {
    'text': (raw('data.txt', 'Grüße 中文\n' * 30), False),
    'jsonl': (_JSONL, False),
    'csv': (_CSV, False),
    'toml': (raw('data.toml', '[[examples]]\ninput = "a"\noutput = "b"\n' * 20), False),
    'json': (raw('data.json', json.dumps(amid())), True),
    'gz': (raw('data.txt.gz', gzip.compress(PROSE)), True),
    'zst': (zst('data.txt.zst', PROSE), True),
    'bz2': (raw('data.txt.bz2', bz2.compress(PROSE)), True),
    'xz': (raw('data.txt.xz', lzma.compress(PROSE)), True),
    'parquet': (parquet({'text': TEXTS}), True),
    'arrow': (arrow({'text': TEXTS}), True),
    'arrow stream': (arrow({'text': TEXTS}, stream=True), True),
    'HDF5 of text': (hdf5(text=TEXTS), True),
    'HDF5 of ids': (hdf5(tokens=_IDS), True),
    'npy': (npy(_IDS), True),
    'npy of text': (npy(np.array(TEXTS)), True),
    'npz': (npz(tokens=_IDS), True),
    'arrayrecord': (arrayrecord([text.encode() for text in TEXTS]), True),
    'tfrecord': (tfrecord([text.encode() for text in TEXTS]), False),  # a file cut between two records is valid
    'SQLite': (database(_TABLE, _ROWS), True),
    'zip': (zipped({'a.txt': PROSE, 'b.txt': PROSE}), True),
    'tar': (tarred('a.txt'), True),
    'tgz': (tarred('a.txt', ending='.tgz'), True),
}

"""Text in other encodings than UTF-8 is read as what it is, or refused with the name of all such files."""

import gzip
import json

import pytest
from bad_files import PROSE

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.formats.encoding import is_binary, utf16_of
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import Document, SourceConfig
from llm_jax.data.sources.files import open_source

TEXT = 'Grüße aus Köln, naïve café.\r\nDie zweite Zeile, ohne Not.\n' * 40
RUSSIAN = 'Привет, мир. Это текст на русском языке.\n' * 40
CHINESE = '这是一个中文文本。没有空格。\n' * 40


def read(path, **options):
  return [item for _, item in open_source(SourceConfig(str(path), **options), 'no cache').records()]


def texts(path, **options):
  items = read(path, **options)
  assert all(isinstance(item, Document) for item in items), items
  return [item.text for item in items]


@pytest.mark.parametrize('text', [TEXT, RUSSIAN, CHINESE])
@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32', 'utf-16-be'])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, text, encoding):
  marked = ('\ufeff' + text if encoding == 'utf-16-be' else text).encode(encoding)
  (tmp_path / 'a.txt').write_bytes(marked)
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(marked))
  assert texts(tmp_path / 'a.txt') == [text]
  assert ''.join(texts(tmp_path / 'b.txt.gz', max_record_bytes=100)) == text
  assert texts(tmp_path) == [text, text]


@pytest.mark.parametrize('text', [TEXT, RUSSIAN, CHINESE, PROSE.decode()])
@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
def test_utf16_without_a_mark_is_named_and_read(tmp_path, text, encoding):
  (tmp_path / 'a.txt').write_bytes(text.encode(encoding))
  [bad] = read(tmp_path / 'a.txt')
  assert f'is {encoding.upper()} text without a byte order mark' in bad.why
  config = DataConfig(path=str(tmp_path / 'a.txt'), tokenizer='byte', cache_dir=str(tmp_path / 'cache'))
  with pytest.raises(DataError, match=f'set config.data.encoding to {encoding}') as raised:
    open_data(config)
  assert str(raised.value).count(' set ') == 1, 'one remedy'
  assert texts(tmp_path / 'a.txt', encoding=encoding) == texts(tmp_path / 'a.txt', encoding='utf-16') == [text]


@pytest.mark.parametrize('text, encoding', [(TEXT, 'cp1252'), (TEXT, 'latin-1'), (RUSSIAN, 'cp1251'),
                                            (CHINESE, 'gb18030'), ('日本語のテキスト。\n' * 40, 'shift_jis')])
def test_one_setting_reads_all_files_of_a_folder(tmp_path, text, encoding):
  (tmp_path / 'a.txt').write_bytes(text.encode(encoding))
  (tmp_path / 'b.txt').write_text('UTF-8 stays: 中文 é')
  (tmp_path / 'c.jsonl').write_bytes(json.dumps({'text': text}, ensure_ascii=False).encode(encoding))
  (tmp_path / 'd.csv').write_bytes(f'text\n"{text}"\n'.encode(encoding))
  (tmp_path / 'e.json').write_bytes(json.dumps([{'text': text}], ensure_ascii=False).encode(encoding))
  (tmp_path / 'f.toml').write_bytes(f"[[x]]\ntext = '''{text}'''\n".replace('\r', '').encode(encoding))
  (tmp_path / 'g.txt').write_bytes(text.encode('utf-16'))
  found = texts(tmp_path, encoding=encoding)
  assert found == [text, 'UTF-8 stays: 中文 é', text, text, text, text.replace('\r', ''), text]


def test_all_files_that_are_not_utf8_are_named_at_once(tmp_path):
  for name in ('a', 'b', 'c'):
    (tmp_path / f'{name}.txt').write_bytes(TEXT.encode('cp1252'))
  (tmp_path / 'd.txt').write_text(TEXT)
  (tmp_path / 'e.png').write_bytes(b'\x89PNG\r\n' + bytes(99))
  config = DataConfig(path=str(tmp_path), tokenizer='byte', cache_dir=str(tmp_path / '.cache'))
  with pytest.raises(DataError, match=r'a.txt: not UTF-8 text at byte 2 .*3 of 4 file.*a.txt \(perhaps cp1252\), b.txt '
                                      r'.*c.txt .*set config.data.encoding to cp1252'):
    open_data(config)


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path):
  (tmp_path / 'a.txt').write_bytes(RUSSIAN.encode() + b'\xe9' + RUSSIAN.encode())
  [bad] = read(tmp_path / 'a.txt', encoding='cp1252')
  assert 'not UTF-8 text at byte' in bad.why
  with pytest.raises(DataError) as error:
    open_data(DataConfig(path=str(tmp_path), tokenizer='byte', cache_dir=str(tmp_path / '.cache')))
  assert 'data.encoding' not in str(error.value)


def test_bytes_that_the_encoding_lacks_are_reported(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9 \x81 and on')
  [bad] = read(tmp_path / 'a.txt', encoding='cp1252')
  assert 'not cp1252 text at byte 5 (81' in bad.why


@pytest.mark.parametrize('name', ['nonsense', 'base64', 'utf\0'])
def test_an_unknown_encoding_is_refused(tmp_path, name):
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(ConfigError, match=r'config\.data\.encoding'):
    read(tmp_path / 'a.txt', encoding=name)


@pytest.mark.parametrize('text', [TEXT, RUSSIAN, CHINESE, 'a', '', '\x1b[1mbold\x1b[0m\n' * 9, 'x\0y'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16', 'cp1252', 'gb18030', 'utf-16-le'])
def test_text_is_not_taken_for_binary(text, encoding):
  data = text.encode(encoding, 'ignore')
  assert not is_binary(data)
  assert (utf16_of(data) is not None) == (encoding == 'utf-16-le' and len(text) > 3)

"""Tokenizers lose nothing: text -> ids -> the same text, and no text is ever the special token."""

import json
import random

import pytest
import tokenizers

from llm_jax.data.tokenizers import EOT, TOKENIZERS, decode, load_tokenizer
from llm_jax.errors import DataError

TEXTS = [
    'the cat sat on the mat and the cat ate the rat. ' * 20,
    'def f(x):\n\treturn x  # four    spaces, tabs\t\t\n',
    '我能吞下玻璃而不伤身体。日本語のテキスト、한국어。',
    'family \U0001F468\u200d\U0001F469\u200d\U0001F467, flag \U0001F1E9\U0001F1EA, e\u0301 and é, \U0001F600',
    'nul\x00nul\x00\x00 bell\x07 delete\x7f',
    'crlf\r\nlone cr\rlf\n\n\r\n',
    f'{EOT} in front, {EOT}{EOT} doubled, at the end {EOT}',
    ' leading and trailing \u00a0\u2028\u2029\ufeff ',
    '',
]


@pytest.fixture(scope='module', params=list(TOKENIZERS))
def tokenizer(request):
  return TOKENIZERS[request.param](iter(TEXTS), 320)


def saved_and_loaded(tokenizer, folder):
  path = folder / 'tokenizer.json'
  path.write_text(tokenizer.to_json(), encoding='utf-8')
  return load_tokenizer(path)


def test_round_trip(tokenizer):
  for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
    assert decode(tokenizer, ids) == text


def test_no_text_becomes_the_special_token(tokenizer, tmp_path):
  for t in (tokenizer, saved_and_loaded(tokenizer, tmp_path)):
    for ids in t.encode([EOT, *TEXTS]):
      assert t.eot_id not in ids.tolist()
    assert decode(t, t.encode([EOT])[0]) == EOT
    assert t.token_bytes[t.eot_id] == b''
    assert decode(t, [t.eot_id, *t.encode(['the'])[0], t.eot_id]) == 'the'


def test_token_bytes_are_the_bytes_of_the_text(tokenizer):
  for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
    assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())


def test_texts_are_encoded_each_by_itself(tokenizer):
  alone = [tokenizer.encode([text])[0].tolist() for text in TEXTS]
  assert [ids.tolist() for ids in tokenizer.encode(TEXTS)] == alone
  assert alone[-1] == []


def test_saved_and_loaded_gives_the_same_ids(tokenizer, tmp_path):
  loaded = saved_and_loaded(tokenizer, tmp_path)
  assert type(loaded) is type(tokenizer)
  assert loaded.eot_id == tokenizer.eot_id
  assert loaded.token_bytes == tokenizer.token_bytes
  for ours, theirs in zip(tokenizer.encode(TEXTS), loaded.encode(TEXTS), strict=True):
    assert ours.tolist() == theirs.tolist()
  assert loaded.to_json() == tokenizer.to_json()


@pytest.mark.parametrize('name', ['byte', 'bpe'])
def test_any_text_can_be_encoded(name):
  tokenizer = TOKENIZERS[name](['only plain words were seen when it was made'], 300)
  rng = random.Random(0)
  points = [c for c in (rng.randrange(0x110000) for _ in range(5000)) if not 0xD800 <= c < 0xE000]
  text = ''.join(map(chr, [*range(0x300), *points]))
  assert decode(tokenizer, tokenizer.encode([text])[0]) == text


def test_a_cut_character_ends_in_the_replacement_character():
  for name in ('byte', 'bpe'):
    tokenizer = TOKENIZERS[name](['plain words'], 270)
    for character in 'é中\U0001F600':
      ids = tokenizer.encode([f'ab{character}'])[0]
      assert decode(tokenizer, ids) == f'ab{character}'
      for cut in range(1, len(character.encode())):
        assert decode(tokenizer, ids[:-cut]) == 'ab\ufffd'


def test_char_names_the_unknown_character():
  tokenizer = TOKENIZERS['char'](['abc', 'xyz'], 0)
  assert [decode(tokenizer, ids) for ids in tokenizer.encode(['cabzyx'])] == ['cabzyx']
  for unknown in '\x00mé\U0010FFFF':  # before, between and after the known ones
    with pytest.raises(DataError, match='is not among the 6') as e:
      tokenizer.encode(['abc', f'ab{unknown}c'])
    assert repr(unknown) in str(e.value)


def test_char_has_one_token_a_character():
  tokenizer = TOKENIZERS['char'](TEXTS, 0)
  assert sorted(tokenizer.token_bytes[:-1]) == sorted({c.encode() for text in TEXTS for c in text})
  assert [len(ids) for ids in tokenizer.encode(TEXTS)] == [len(text) for text in TEXTS]


def test_bpe_learns_merges_up_to_vocab_size():
  corpus = [TEXTS[0]]
  lengths = []
  for vocab_size in (257, 263, 270):
    tokenizer = TOKENIZERS['bpe'](corpus, vocab_size)
    assert len(tokenizer.token_bytes) == vocab_size
    assert set(tokenizer.token_bytes) >= {bytes([i]) for i in range(256)}
    lengths.append(len(tokenizer.encode(corpus)[0]))
  assert lengths[0] == len(TEXTS[0].encode())
  assert lengths[0] > lengths[1] > lengths[2]


def test_bpe_agrees_with_the_decoder_of_its_library():
  tokenizer = TOKENIZERS['bpe'](TEXTS, 320)
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
    assert library.decode(ids.tolist(), skip_special_tokens=False) == text


def test_bpe_without_the_special_token_is_refused(tmp_path):
  spec = json.loads(TOKENIZERS['bpe'](TEXTS, 300).to_json())
  spec['added_tokens'] = []
  spec['model']['vocab'] = {('<|other|>' if token == EOT else token): i for token, i in spec['model']['vocab'].items()}
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec))
  with pytest.raises(DataError, match='endoftext'):
    load_tokenizer(path)

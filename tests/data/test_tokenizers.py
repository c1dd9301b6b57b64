"""Fitted tokenizers: lossless but for words, no special tokens from text, the same ids after saving."""

import itertools
import json
import random
import re
import time
import tracemalloc

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.tokenizers import bpe
from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, TokenizerConfig, decode, load_tokenizer

EOT = '<|endoftext|>'
TEXTS = [
    'the cat sat on the mat and the cat ate the rat. ' * 20,
    'def f(x):\n\treturn x  # four    spaces, tabs\t\t\n',
    '我能吞下玻璃而不伤身体。日本語のテキスト、한국어。',
    'family \U0001F468\u200d\U0001F469\u200d\U0001F467, flag \U0001F1E9\U0001F1EA, e\u0301 and é, \U0001F600',
    'nul\x00nul\x00\x00 bell\x07 delete\x7f',
    'crlf\r\nlone cr\rlf\n\n\r\n',
    f'{EOT} in front, {EOT}{EOT} doubled, at the end {EOT}',
    '<pad> <bos> <eos> <unk>',
    ' leading and trailing \u00a0\u2028\u2029\ufeff ',
    '',
]
SOME = settings(max_examples=40, deadline=None, derandomize=True)
# All of Unicode, and text of few characters, where tokens overlap often.
ANY_TEXT = st.text(max_size=60) | st.text('ab c\n1.\'\u00a0\x1c\u0301é中', max_size=120)


def fit(name, texts, **config):
  return TOKENIZERS[name].fit(iter(texts), TokenizerConfig(**config))


def saved_and_loaded(tokenizer, folder):
  path = folder / 'tokenizer.json'
  path.write_text(tokenizer.to_json(), encoding='utf-8')
  return load_tokenizer(path)


def ids_of(tokenizer, texts):
  return [ids.tolist() for ids in tokenizer.encode(texts)]


def library_ids(tokenizer, texts):
  """Ids that Hugging Face `tokenizers` gives with the tokenizer's saved file."""
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  library.encode_special_tokens = True
  return [e.ids for e in library.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(scope='module', params=list(TOKENIZERS))
def tokenizer(request):
  return fit(request.param, TEXTS, vocab_size=320)


def test_decoding_gives_the_text_back(tokenizer):
  assert [decode(tokenizer, ids) for ids in tokenizer.encode(TEXTS)] == TEXTS


@pytest.mark.parametrize('name', TOKENIZERS)
def test_lossless_tokenizers_give_every_text_back(name):
  tokenizer = fit(name, ['zebra', 'the cat'])
  texts = ['the zebra'] if name == 'char' else ['the dog', 'Ä']
  assert (name != 'word') == ([decode(tokenizer, ids) for ids in tokenizer.encode(texts)] == texts)


def test_text_never_becomes_a_special_token(tokenizer, tmp_path):
  for t in (tokenizer, saved_and_loaded(tokenizer, tmp_path)):
    for ids in ids_of(t, TEXTS):
      assert not {t.bos_id, t.eos_id} & set(ids)
    assert t.token_bytes[t.bos_id] == t.token_bytes[t.eos_id] == b''
    the = t.encode(['the'])[0]
    assert decode(t, [t.bos_id, *the, t.eos_id]) == decode(t, the)


def test_each_text_is_encoded_separately(tokenizer):
  alone = [ids_of(tokenizer, [text])[0] for text in TEXTS]
  assert ids_of(tokenizer, TEXTS) == alone
  assert ids_of(tokenizer, TEXTS * 7) == alone * 7
  assert alone[-1] == [] and ids_of(tokenizer, []) == []


def test_a_loaded_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
  loaded = saved_and_loaded(tokenizer, tmp_path)
  assert type(loaded) is type(tokenizer)
  assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  assert loaded.token_bytes == tokenizer.token_bytes
  assert ids_of(loaded, TEXTS) == ids_of(tokenizer, TEXTS)
  assert loaded.to_json() == tokenizer.to_json()


def test_fitting_is_deterministic(tokenizer):
  name = next(name for name in TOKENIZERS if type(fit(name, TEXTS, vocab_size=320)) is type(tokenizer))
  assert fit(name, TEXTS, vocab_size=320).to_json() == tokenizer.to_json()


@pytest.mark.parametrize('name', ['byte', 'bpe'])
def test_any_text_can_be_encoded(name):
  tokenizer = fit(name, ['the training text has only plain words'], vocab_size=300)

  @SOME
  @given(st.lists(ANY_TEXT, max_size=4))
  def check(texts):
    assert [decode(tokenizer, ids) for ids in tokenizer.encode(texts)] == texts

  check()


@SOME
@given(st.lists(ANY_TEXT, min_size=1))
def test_char_has_one_token_a_character(texts):
  tokenizer = fit('char', texts)
  assert sorted(tokenizer.token_bytes[:-1]) == sorted({c.encode() for text in texts for c in text})
  assert [len(ids) for ids in tokenizer.encode(texts)] == [len(text) for text in texts]
  assert [decode(tokenizer, ids) for ids in tokenizer.encode(texts)] == texts


def test_char_names_the_unknown_character():
  tokenizer = fit('char', ['abc', 'xyz'])
  for unknown in '\x00mé\U0010FFFF':  # before, between and after the known code points
    with pytest.raises(DataError, match='at position 2 of a text is not among the 6 characters') as e:
      tokenizer.encode(['abc', f'ab{unknown}c'])
    assert repr(unknown) in str(e.value)


def test_bytes_are_not_copied():
  ids = fit('byte', []).encode(['plain'])[0]
  assert ids.dtype == 'uint8' and ids.base is not None


def test_a_cut_character_ends_in_the_replacement_character():
  for name in ('byte', 'bpe'):
    tokenizer = fit(name, ['plain words'], vocab_size=270)
    for character in 'é中\U0001F600':
      ids = tokenizer.encode([f'ab{character}'])[0]
      assert decode(tokenizer, ids) == f'ab{character}'
      for cut in range(1, len(character.encode())):
        assert decode(tokenizer, ids[:-cut]) == 'ab\ufffd'


def test_an_invalid_id_is_named(tokenizer):
  for wrong in (-1, len(tokenizer.token_bytes)):
    with pytest.raises(DataError, match=f'token id {wrong} '):
      decode(tokenizer, [0, wrong])


@pytest.mark.parametrize('name', ['byte', 'bpe'])
def test_a_lone_surrogate_is_named(name):
  with pytest.raises(DataError, match=r"surrogate '\\ud800' at position 2"):
    fit(name, ['ab'], vocab_size=300).encode(['fine', 'ab\ud800'])


# Words.

def words_of(tokenizer):
  return [token.decode() for token in tokenizer.token_bytes[4:]]


def test_words_are_ordered_by_frequency_then_text():
  tokenizer = fit('word', ['b c', 'a b', 'b c a'], pattern=r'\w')
  assert words_of(tokenizer) == ['b', 'a', 'c']  # 3, 2, 2
  assert ids_of(tokenizer, ['c a z b']) == [[6, 5, 3, 4]]
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_rare_words_are_unknown():
  texts = ['one two two three three three']
  for least, known in ((1, {'one', 'two', 'three'}), (2, {'two', 'three'}), (3, {'three'}), (4, set())):
    assert set(words_of(fit('word', texts, min_frequency=least, pattern=r'\w+'))) == known
  assert words_of(fit('word', texts, vocab_size=6, pattern=r'\w+')) == ['three', 'two']


@SOME
@given(st.lists(ANY_TEXT, min_size=1), ANY_TEXT)
def test_default_words_partition_every_text(texts, other):
  tokenizer = fit('word', texts, vocab_size=1 << 20)
  assert [decode(tokenizer, ids) for ids in tokenizer.encode(texts)] == texts
  assert all((3 in ids) == (decode(tokenizer, ids) != other) for ids in ids_of(tokenizer, [other]))


def test_default_words_of_code_and_prose():
  text = "fn f2(a: vec3<f32>) {\n    return 10.5;  // don't\n}\n"
  tokenizer = fit('word', [text])
  assert [tokenizer.token_bytes[i].decode() for i in tokenizer.encode([text])[0]] == [
      'fn', ' f2', '(', 'a', ':', ' vec3', '<', 'f32', '>', ')', ' {', '\n    ', 'return', ' 1', '0', '.', '5', ';',
      '  ', '/', '/', ' don', "'", 't', '\n', '}', '\n']


@pytest.mark.parametrize('pattern, why', [('(a', 'not a regular expression'), (r'(\w)+', 'write (?:...)')])
def test_an_invalid_pattern_is_rejected(pattern, why):
  with pytest.raises(ConfigError) as e:
    fit('word', ['a'], pattern=pattern)
  assert why in str(e.value) and repr(pattern) in str(e.value)


def test_a_vocabulary_without_room_for_words_is_rejected():
  with pytest.raises(ConfigError, match='vocab_size=4'):
    fit('word', ['a'], vocab_size=4)


def test_fitting_words_takes_constant_memory():
  def peak(count):
    tracemalloc.start()
    fit('word', (f'{TEXTS[0]} {i % 10}' for i in range(count)))
    try:
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  assert peak(500) < 1.2 * peak(50)


# BPE.

def test_bpe_learns_merges_up_to_vocab_size():
  corpus = [TEXTS[0]]
  lengths = []
  for vocab_size in (257, 263, 270):
    tokenizer = fit('bpe', corpus, vocab_size=vocab_size)
    assert len(tokenizer.token_bytes) == vocab_size
    assert set(tokenizer.token_bytes) >= {bytes([i]) for i in range(256)}
    lengths.append(len(tokenizer.encode(corpus)[0]))
  assert lengths[0] == len(TEXTS[0].encode())
  assert lengths[0] > lengths[1] > lengths[2]


def with_splitter(tokenizer, splitter):
  """A BPE tokenizer with the pattern WORDS, or GPT-2's, and the same merges."""
  spec = json.loads(tokenizer.to_json())
  if splitter == 'gpt2':
    spec['pre_tokenizer'] = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  assert bpe.pattern_of(spec) == {'words': bpe.WORDS, 'gpt2': bpe.GPT2}[splitter]
  return HuggingFaceTokenizer(json.dumps(spec))


splitters = pytest.mark.parametrize('splitter', ['words', 'gpt2'])


@splitters
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(ANY_TEXT, min_size=1, max_size=8), st.lists(ANY_TEXT, min_size=1, max_size=4),
       st.sampled_from([258, 270, 320]))
def test_bpe_ids_equal_those_of_hugging_face(splitter, corpus, texts, vocab_size):
  tokenizer = with_splitter(fit('bpe', corpus, vocab_size=vocab_size), splitter)
  assert bpe.merge_ranks(json.loads(tokenizer.to_json())) is not None
  assert ids_of(tokenizer, corpus + texts) == library_ids(tokenizer, corpus + texts)
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  assert [library.decode(ids) for ids in ids_of(tokenizer, texts)] == texts


@splitters
def test_bpe_splits_every_character_class_as_hugging_face(splitter):
  # Tokens of a letter, digit, mark or space and the first byte of the next character show where the pattern cuts.
  byte_of = bpe.byte_alphabet()
  letters = sorted(byte_of, key=byte_of.get)
  pairs = [(letters[ord(a)], letters[b]) for a in 'a1. \n' for b in range(256)]
  spec = json.loads(fit('bpe', [], vocab_size=257).to_json())
  spec['model']['merges'] = pairs
  spec['model']['vocab'] |= {a + b: i for i, (a, b) in enumerate(pairs, 257)}
  tokenizer = with_splitter(HuggingFaceTokenizer(json.dumps(spec)), splitter)
  assert bpe.merge_ranks(json.loads(tokenizer.to_json())) is not None
  points = [*range(0x3400), *range(0x3400, 0xD800, 61), *range(0xE000, 0x20000, 3), *range(0x20000, 0x110000, 997)]
  texts = [''.join(f'a{c}1{c}.{c} {c}\n{c}' for c in map(chr, points[i::20])) for i in range(20)]
  assert ids_of(tokenizer, texts) == library_ids(tokenizer, texts)


@pytest.mark.parametrize('text', [
    'a' * 100_000, 'ab' * 50_000 + '.', ' ' * 100_000 + 'x', '\n' * 100_000 + ' x',
    pytest.param('x' + ' ' * 1_000_000 + '\n x', marks=pytest.mark.slow),
    ' ' * 262_143 + 'x' + '\u3000' * 300_000 + '\x1c' * 20_000 + 'x' + '\t' * 300_000,
])
@splitters
def test_long_runs_take_linear_time(splitter, text):
  tokenizer = with_splitter(fit('bpe', ['a' * 64 + ' ' * 64 + 'x', 'ab ab ab \n\n\n'], vocab_size=300), splitter)
  start = time.perf_counter()
  ids = ids_of(tokenizer, [text])
  assert time.perf_counter() - start < 10
  assert decode(tokenizer, ids[0]) == text
  assert ids == library_ids(tokenizer, [text])


@SOME
@given(st.lists(st.tuples(st.sampled_from([' ', '\n', '\u3000', 'x', ' \t', '\x1c', 'x ']),
                          st.sampled_from([1, 3, 200_000, 300_000])), max_size=4))
def test_long_runs_are_cut_before_their_last_character(runs):
  text = ''.join(part * count for part, count in runs)
  parts = bpe.without_long_runs(text)
  assert ''.join(parts) == text
  for left, right in itertools.pairwise(parts):
    assert left.endswith(tuple(bpe.WHITE)) and right[0] in bpe.WHITE and right[1] not in bpe.WHITE
  for part in parts:
    inner = part.rstrip(bpe.WHITE)
    assert max(map(len, re.findall(f'[{bpe.WHITE}]+', inner)), default=0) < 1 << 19


@pytest.mark.parametrize('text', ['acgt', 'abcdefghijklmnopqrstuvwxyz', '0123456789', '=-+*', ' \n'])
def test_bpe_trains_in_linear_time_on_a_run_without_a_break(text):
  run = ''.join(random.Random(0).choices(text, k=400_000))
  begin = time.process_time()
  tokenizer = fit('bpe', [run, 'some words as well'], vocab_size=400)
  [ids] = tokenizer.encode([run])
  assert time.process_time() - begin < 5
  assert decode(tokenizer, ids) == run


def test_cutting_long_words_in_training_changes_nothing_for_others():
  texts = ['the words of a usual text, and 1234 numbers', 'x' * 999 + ' ' + 'y' * 1000 + ' the words']
  shortened = fit('bpe', texts, vocab_size=300).to_json()
  library = tokenizers.Tokenizer.from_str(shortened)
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = library.pre_tokenizer
  trained.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<|endoftext|>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  assert json.loads(trained.to_str())['model'] == json.loads(shortened)['model']


def with_merges(merges, extra=()):
  """A byte-level tokenizer.json of these merges; ids in the order of first mention, `extra` tokens last."""
  spec = json.loads(fit('bpe', [], vocab_size=257).to_json())
  tokens = dict.fromkeys([a + b for a, b in merges] + list(extra))
  spec['model']['merges'] = merges
  spec['model']['vocab'] |= {token: i for i, token in enumerate(tokens, 257)}
  return spec


@pytest.mark.parametrize('spec', [
    with_merges([('b', 'c'), ('a', 'b'), ('ab', 'c')]),  # abc cannot be merged: it encodes to a, bc
    with_merges([('b', 'c'), ('a', 'b'), ('a', 'bc'), ('ab', 'c')]),  # two pairs make abc
    with_merges([('a', 'b')], extra=['abc']),  # no pair makes abc
], ids=['unreachable', 'two pairs', 'no pair'])
def test_bpe_that_tiktoken_cannot_match_uses_hugging_face(spec, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec))
  tokenizer = load_tokenizer(path)
  assert bpe.merge_ranks(spec) is None
  rng = random.Random(0)
  texts = [''.join(rng.choices('abc', k=30)) for _ in range(50)]
  assert ids_of(tokenizer, texts) == library_ids(tokenizer, texts)
  assert [decode(tokenizer, ids) for ids in tokenizer.encode(texts)] == texts


def test_ids_out_of_merge_order_use_hugging_face(tmp_path):
  spec = with_merges([('a', 'b'), ('b', 'c')])
  assert bpe.merge_ranks(spec) is not None
  vocab = spec['model']['vocab']
  vocab['ab'], vocab['bc'] = vocab['bc'], vocab['ab']
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec))
  tokenizer = load_tokenizer(path)
  assert bpe.merge_ranks(spec) is None
  # tiktoken would merge these in a different order.
  wrong = bpe.open_bpe({t: i for i, t in enumerate(tokenizer.token_bytes) if t}, bpe.WORDS)
  assert ids_of(tokenizer, ['abc']) == library_ids(tokenizer, ['abc']) != [wrong.encode_ordinary('abc')]

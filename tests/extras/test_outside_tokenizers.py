"""Tokenizers of other libraries: our ids equal theirs, text never gives special tokens, saving keeps everything."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, TokenizerConfig, decode, load_tokenizer, open_tokenizer

CORPUS = [
    'the cat sat on the mat and the cat ate the rat. ' * 20,
    'def f(x):\n\treturn x  # four    spaces, tabs\t\t\n',
    'Äpfel, 日本語のテキスト, e\u0301 and é, ﬁne \U0001F600 12345 67',
    '<s> [CLS] <|endoftext|> </s> [SEP] <mask> ' * 9,
]
SPELLED = ['<s>', 'the <s> cat</s>', '<s><s></s>', '[CLS] [SEP]', 'a<|endoftext|>b', '<mask>', '\uff1cs\uff1e']
SOME = settings(max_examples=40, deadline=None, derandomize=True)
ANY_TEXT = st.text(max_size=40) | st.text("ab theca<s/>|[]\n1.'é\u2581中", max_size=60)


def trained(model, trainer, **parts):
  tokenizer = tokenizers.Tokenizer(model)
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  tokenizer.train_from_iterator(CORPUS, trainer)
  return tokenizer


def byte_level(special, **parts):
  trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  parts = {'pre_tokenizer': pre_tokenizers.ByteLevel(add_prefix_space=False), 'decoder': decoders.ByteLevel()} | parts
  return trained(models.BPE(), trainer, **parts)


def llama3():
  split = pre_tokenizers.Split(tokenizers.Regex(r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+'), 'isolated')
  tokenizer = byte_level(['<|begin_of_text|>', '<|end_of_text|>'], pre_tokenizer=pre_tokenizers.Sequence(
      [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
  tokenizer.post_processor = processors.TemplateProcessing(
      single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 0)])
  return tokenizer


def llama2():
  tokenizer = trained(
      models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True),
      trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=[
          '<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]),
      normalizer=normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]),
      decoder=decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(' ', 1, 0)]))
  spec = json.loads(tokenizer.to_str())
  # The bytes are words of the model, not added tokens.
  spec['added_tokens'] = spec['added_tokens'][:3]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def unigram():
  tokenizer = trained(models.Unigram(), trainers.UnigramTrainer(
      vocab_size=120, special_tokens=['<unk>', '<s>', '</s>', '<mask>'], unk_token='<unk>', show_progress=False),
      pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(), normalizer=normalizers.NFKC())
  spec = json.loads(tokenizer.to_str())
  for i, piece in enumerate(spec['model']['vocab'][:4]):
    spec['model']['vocab'][i] = [piece[0], 0.0]  # the same score as words, as in XLM-R's vocabulary
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def wordpiece():
  return trained(models.WordPiece(unk_token='[UNK]'), trainers.WordPieceTrainer(
      vocab_size=150, special_tokens=['[UNK]', '[CLS]', '[SEP]'], show_progress=False),
      normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
      decoder=decoders.WordPiece())


HUGGING_FACE = {
    'gpt2': lambda: byte_level(['<|endoftext|>']),
    'prefix space': lambda: byte_level(['<s>', '</s>'], pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    'nfc': lambda: byte_level(['<|endoftext|>'], normalizer=normalizers.NFC()),
    'llama3': llama3,
    'llama2': llama2,
    'unigram': unigram,
    'wordpiece': wordpiece,
}
LOSSLESS = {'gpt2', 'llama3'}
# Bytes that the ids decode to before the text: the space that the model adds.
PUTS_A_SPACE = {'prefix space', 'llama2', 'unigram', 'wordpiece'}


def ids_of(tokenizer, texts):
  return [ids.tolist() for ids in tokenizer.encode(texts)]


def opened(library, folder):
  path = folder / 'tokenizer.json'
  path.write_text(library.to_str(), encoding='utf-8')
  return open_tokenizer(str(path))


def saved_and_loaded(tokenizer, folder):
  path = folder / 'saved.json'
  path.write_text(tokenizer.to_json(), encoding='utf-8')
  return load_tokenizer(path)


def sentencepiece_model(**options):
  model = io.BytesIO()
  options = {'vocab_size': 420, 'hard_vocab_limit': False, 'minloglevel': 2, 'byte_fallback': True} | options
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options)
  return model.getvalue()


@pytest.fixture(scope='module', params=[*HUGGING_FACE, 'sentencepiece'])
def named(request, tmp_path_factory):
  """(name, our tokenizer, a function from text to the library's own ids, or None for spelled special tokens)."""
  folder = tmp_path_factory.mktemp('tokenizer')
  if request.param == 'sentencepiece':
    path = folder / 'some.model'
    path.write_bytes(sentencepiece_model())
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return request.param, open_tokenizer(str(path)), library.encode, library.decode
  library = HUGGING_FACE[request.param]()
  return (request.param, opened(library, folder), lambda text: library.encode(text, add_special_tokens=False).ids,
          library.decode)


def test_ids_equal_those_of_the_library(named):
  _, tokenizer, encode, _ = named
  texts = CORPUS[:3]
  assert ids_of(tokenizer, texts) == [encode(text) for text in texts]


def test_token_bytes_give_the_text_back(named):
  name, tokenizer, _, library_decode = named
  text = 'the cat sat on  the mat 123'
  ids = tokenizer.encode([text])[0]
  if name == 'wordpiece':
    text = 'the cat sat on the mat 123'
  assert decode(tokenizer, ids) == (' ' if name in PUTS_A_SPACE | {'sentencepiece'} else '') + (
      ' '.join(text.split()) if name in ('wordpiece', 'sentencepiece') else text)
  assert library_decode(ids.tolist()).split() == text.split()


def test_text_never_becomes_a_special_token(named):
  _, tokenizer, _, _ = named

  @SOME
  @given(ANY_TEXT | st.sampled_from(SPELLED))
  def check(text):
    ids = ids_of(tokenizer, [text, text + text])
    assert not {tokenizer.bos_id, tokenizer.eos_id} & {i for row in ids for i in row}

  check()
  assert tokenizer.token_bytes[tokenizer.bos_id] == tokenizer.token_bytes[tokenizer.eos_id] == b''


def test_lossless_tokenizers_give_every_text_back(named):
  name, tokenizer, _, _ = named
  texts = [*CORPUS, *SPELLED, 'a\u2581b', ' x', 'X']

  @SOME
  @given(ANY_TEXT)
  def check(text):
    assert decode(tokenizer, tokenizer.encode([text])[0]) == text

  if name in LOSSLESS:
    check()
  assert (name in LOSSLESS) == all(decode(tokenizer, tokenizer.encode([text])[0]) == text for text in texts)


def test_a_loaded_tokenizer_equals_the_saved_one(named, tmp_path):
  _, tokenizer, _, _ = named
  loaded = saved_and_loaded(tokenizer, tmp_path)
  assert type(loaded) is type(tokenizer)
  assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  assert loaded.token_bytes == tokenizer.token_bytes
  assert ids_of(loaded, CORPUS + SPELLED) == ids_of(tokenizer, CORPUS + SPELLED)
  assert loaded.to_json() == tokenizer.to_json()


def test_a_lone_surrogate_is_named(named):
  with pytest.raises(DataError, match=r"surrogate '\\udc80' at position 1"):
    named[1].encode(['a\udc80'])


@pytest.mark.parametrize('name, bos, eos', [
    ('gpt2', '<|endoftext|>', '<|endoftext|>'), ('llama3', '<|begin_of_text|>', '<|end_of_text|>'),
    ('llama2', '<s>', '</s>'), ('wordpiece', '[CLS]', '[SEP]')])
def test_bos_and_eos_are_found_by_name(name, bos, eos, tmp_path):
  library = HUGGING_FACE[name]()
  tokenizer = opened(library, tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (library.token_to_id(bos), library.token_to_id(eos))


def test_a_tokenizer_without_bos_and_eos_is_rejected(tmp_path):
  with pytest.raises(ConfigError, match=r'tokenizer.json: the tokenizer has no bos token.*endoftext'):
    opened(byte_level(['<other>']), tmp_path)
  path = tmp_path / 'some.model'
  path.write_bytes(sentencepiece_model(bos_id=-1, eos_id=-1))
  with pytest.raises(ConfigError, match=r'some.model: .*neither a bos nor an eos'):
    open_tokenizer(str(path))


def test_one_of_bos_and_eos_is_used_for_both(tmp_path):
  path = tmp_path / 'some.model'
  path.write_bytes(sentencepiece_model(bos_id=-1, eos_id=2))
  tokenizer = open_tokenizer(str(path))
  assert tokenizer.bos_id == tokenizer.eos_id == 2


def test_texts_are_not_truncated_or_padded(tmp_path):
  library = llama3()
  library.enable_truncation(5)
  library.enable_padding(length=9)
  tokenizer = opened(library, tmp_path)
  assert decode(tokenizer, tokenizer.encode([CORPUS[0]])[0]) == CORPUS[0]


def test_dropout_is_disabled(tmp_path):
  library = byte_level(['<|endoftext|>'])
  plain = opened(library, tmp_path)
  library.model.dropout = 0.5
  tokenizer = opened(library, tmp_path)
  assert ids_of(tokenizer, CORPUS) == ids_of(plain, CORPUS)


def test_added_tokens_are_their_own_text(tmp_path):
  library = byte_level(['<|endoftext|>'])
  library.add_tokens(['<tool call>'])
  tokenizer = opened(library, tmp_path)
  ids = ids_of(tokenizer, ['a<tool call>b'])[0]
  assert tokenizer.token_bytes[ids[1]] == b'<tool call>' and len(ids) == 3
  assert ids == library.encode('a<tool call>b').ids


def test_a_damaged_model_is_named(tmp_path):
  path = tmp_path / 'some.model'
  model = sentencepiece_model()
  for damaged in (b'', b'x' * 100, model[:500], model[:-3]):
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r'some.model: not a SentencePiece model'):
      open_tokenizer(str(path))


# tiktoken finds an encoding through a module of the namespace tiktoken_ext, and its tokens in a cache by URL.
PLUGIN = """
from tiktoken.load import load_tiktoken_bpe

def tiny():
  ranks = load_tiktoken_bpe('https://example.invalid/tiny.tiktoken')
  return {'name': 'tiny', 'pat_str': r'\\s?\\w+|\\s?[^\\s\\w]+|\\s+', 'mergeable_ranks': ranks,
          'special_tokens': {'<|endoftext|>': len(ranks) + 3}}

ENCODING_CONSTRUCTORS = {'tiny': tiny}
"""
SCRIPT = """
import json, sys
import tiktoken
from llm_jax.data.tokenizers.tokenizer import open_tokenizer
tokenizer = open_tokenizer('tiktoken:tiny')
open(sys.argv[1], 'w').write(tokenizer.to_json())
texts = json.load(open(sys.argv[2]))
encoding = tiktoken.get_encoding('tiny')
print(json.dumps([[encoding.encode_ordinary(text) for text in texts], tokenizer.eos_id]))
"""


def test_tiktoken_is_loaded_from_its_cache_and_saved(tmp_path):
  tokens = TOKENIZERS['bpe'].fit(CORPUS, TokenizerConfig(300)).token_bytes[1:]
  cache = tmp_path / 'cache'
  cache.mkdir()
  (cache / hashlib.sha1(b'https://example.invalid/tiny.tiktoken').hexdigest()).write_bytes(
      b''.join(base64.b64encode(token) + f' {i}\n'.encode() for i, token in enumerate(tokens)))
  (tmp_path / 'tiktoken_ext').mkdir()
  (tmp_path / 'tiktoken_ext' / 'tiny.py').write_text(PLUGIN)
  texts = [*CORPUS, *SPELLED, '']
  (tmp_path / 'texts.json').write_text(json.dumps(texts))
  env = os.environ | {'PYTHONPATH': str(tmp_path), 'TIKTOKEN_CACHE_DIR': str(cache), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', SCRIPT, tmp_path / 'saved.json', tmp_path / 'texts.json'], env=env,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  ids, eos_id = json.loads(done.stdout)
  tokenizer = load_tokenizer(tmp_path / 'saved.json')  # this process has neither the encoding nor the cache
  assert ids_of(tokenizer, texts) == ids
  assert [decode(tokenizer, row) for row in ids] == texts
  assert tokenizer.bos_id == tokenizer.eos_id == eos_id == len(tokens) + 3
  assert tokenizer.token_bytes == [*tokens, b'', b'', b'', b'']
  assert saved_and_loaded(tokenizer, tmp_path).to_json() == tokenizer.to_json()


def test_tiktoken_without_a_network_says_what_to_do(tmp_path, monkeypatch):
  for name in ('HTTPS_PROXY', 'https_proxy'):
    monkeypatch.setenv(name, 'http://127.0.0.1:9')
  monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
  with pytest.raises(DataError, match='tiktoken:gpt2 is not in TIKTOKEN_CACHE_DIR and cannot be downloaded'):
    open_tokenizer('tiktoken:gpt2')
  with pytest.raises(ConfigError, match=r"no encoding 'gpt9'; it has .*cl100k_base"):
    open_tokenizer('tiktoken:gpt9')

"""Every document is in one split, or cut at an exact place; its split depends on relevant settings only."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import config_of, jsonl, sides_of, texts_of, write_corpus

from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import Document
from llm_jax.data.sources.filters import Deduplicator, parts_of
from llm_jax.data.sources.splits import SPLITS, SplitConfig, Splitter, borders, content_hash, place

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)
texts_lists = st.lists(st.text('ab中\U0001F600', min_size=1, max_size=9), min_size=1, max_size=12)
# Whole percents, so that exact results can be computed with integers.
percents = st.tuples(st.integers(1, 60), st.integers(0, 39))


def config_for(split, val=0, test=0, **options):
  return SplitConfig(split, val / 100, test / 100, **options)


def dealt(config, documents, resumed_at=()):
  """{split: documents}; at each index in `resumed_at` a new splitter continues from the state's JSON."""
  in_pieces = [after.continues for after in [*documents[1:], Document('', '')]]
  placed = place(config, lambda: zip(documents, in_pieces, strict=True))
  splitter, found = Splitter(config, placed), {side: [] for side in SPLITS}
  for i, document in enumerate(documents):
    if i in resumed_at:
      splitter = Splitter(config, placed, json.loads(json.dumps(splitter.state)))
    for side, part in splitter.deal(document, in_pieces[i]):
      found[side].append(part)
  return found


def joined(documents):
  """Texts of documents, with pieces joined."""
  texts = []
  for document in documents:
    if document.continues:
      texts[-1] += document.text
    else:
      texts.append(document.text)
  return texts


def pieces(texts, length):
  return [Document(str(i), text[at:at + length], continues=at > 0)
          for i, text in enumerate(texts) for at in range(0, len(text), length)]


def different(texts):
  """The texts, each with another first character, so that there are no copies."""
  return [chr(0x4e00 + i) + text for i, text in enumerate(texts)]


@property_test
@given(st.integers(0, 10**9), percents)
def test_borders_are_exact(total, fractions):
  val, test = fractions
  val_begin, test_begin, end = borders(total, val / 100, test / 100)
  assert val_begin == total * (100 - val - test) // 100
  assert abs(test_begin - total * (100 - test) / 100) <= 0.5
  assert 0 <= val_begin <= test_begin <= end == total


def test_borders_of_enwik8_are_the_usual_ones():
  assert borders(10**8, 0.05, 0.05) == (90_000_000, 95_000_000, 100_000_000)


@property_test
@given(texts_lists, percents, st.integers(1, 9), st.sets(st.integers(0, 60)))
def test_tail_cuts_text_at_the_exact_character(texts, fractions, length, resumed_at):
  texts = different(texts)
  text = ''.join(texts)
  val_begin, test_begin, _ = borders(len(text), fractions[0] / 100, fractions[1] / 100)
  found = dealt(config_for('tail', *fractions), pieces(texts, length), resumed_at)
  sides = {side: joined(found[side]) for side in SPLITS}
  assert [''.join(sides[side]) for side in SPLITS] == [text[:val_begin], text[val_begin:test_begin], text[test_begin:]]
  # Documents are unchanged except for the cuts, whether read in pieces or not.
  begins = np.cumsum([0, *map(len, texts)]).tolist()
  cuts = sorted({*begins, val_begin, test_begin})
  assert [t for side in SPLITS for t in sides[side]] == [text[a:b] for a, b in itertools.pairwise(cuts)]


@property_test
@given(st.lists(st.tuples(st.text('ab', min_size=1, max_size=9), st.text('c', max_size=3)), min_size=1, max_size=12),
       percents, st.booleans())
def test_tail_never_cuts_pairs_or_labelled_documents(pairs, fractions, labelled):
  pairs = list(zip(different([t for t, _ in pairs]), [a for _, a in pairs], strict=True))
  documents = [Document('', t + a, label=1) if labelled else Document('', t, a) for t, a in pairs]
  found = dealt(config_for('tail', *fractions), documents)
  assert [d for side in SPLITS for d in found[side]] == documents


@property_test
@given(texts_lists, percents, st.integers(1, 9), st.sets(st.integers(0, 60)), st.randoms())
def test_document_split_depends_on_the_text_alone(texts, fractions, length, resumed_at, rng):
  config = config_for('document', *fractions)
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  side_of = {d.text: side for side, ds in dealt(config, documents).items() for d in ds}
  for side, ds in dealt(config, documents).items():
    assert all(side_of[d.text] == side for d in ds), 'equal documents in two splits'
  others = [dataclasses.replace(d, name='new/name') for d in documents] + [Document('', f'new {i}') for i in range(3)]
  rng.shuffle(others)
  for side, ds in dealt(config, others, resumed_at).items():
    assert all(side_of[d.text] == side for d in ds if d.text in side_of)
  found = dealt(config, pieces(texts, length), resumed_at)
  assert sorted(t for side in SPLITS for t in joined(found[side])) == sorted(texts)


def test_document_split_has_about_the_given_fractions():
  found = dealt(config_for('document', 10, 5), [Document('', str(i)) for i in range(20_000)])
  assert len(found['val']) == pytest.approx(2000, abs=5 * 2000**0.5)
  assert len(found['test']) == pytest.approx(1000, abs=5 * 1000**0.5)


def test_content_hash_depends_on_the_content_alone():
  same = {content_hash(Document(name, 'a', answer)) for name in 'xy' for answer in (None, '')}
  different = {content_hash(d) for d in (Document('', 'ab'), Document('', 'a', 'b'), Document('', '', 'ab'),
                                         Document('', np.array([1, 2])), Document('', np.array([1]), np.array([2])),
                                         Document('', '\ud800'))}
  assert (len(same), len(different)) == (1, 6)
  assert content_hash(Document('', np.array([1], np.uint8))) == content_hash(Document('', np.array([1], np.int64)))


def conversations():
  """Different conversations whose contents, joined, are the same text."""
  turns = [(('user', 'a'), ('assistant', 'b'), ('assistant', 'c')), (('user', 'a'), ('user', 'b'), ('assistant', 'c')),
           (('user', 'a\n\nb'), ('assistant', 'c')), (('user', 'a'), ('assistant', 'b\n\nc'))]
  documents = [Document('', 'a\n\nb\n\nc', messages=messages) for messages in turns]
  return [*documents, Document('', documents[0].text, messages=turns[3][:1] + turns[0][1:2],
                               rejected=turns[3][:1] + turns[0][2:])]


def test_conversations_with_the_same_text_but_other_turns_are_different():
  documents, seen = conversations(), Deduplicator(normalize=True)
  assert len({content_hash(d) for d in [*documents, Document('', documents[0].text)]}) == 6
  assert [seen.seen(*parts_of(d)) for d in documents] == [None] * 5
  assert [seen.seen(*parts_of(d)) for d in documents] == ['duplicate'] * 5
  spaced = dataclasses.replace(documents[0], messages=tuple((role, f'{c} ') for role, c in documents[0].messages))
  assert seen.seen(*parts_of(spaced)) == 'normalized duplicate'
  found = dealt(config_for('tail', 20), documents)
  assert [len(found[side]) for side in SPLITS] == [4, 1, 0]
  found = dealt(config_for('count', val_documents=2), documents)
  assert [len(found[side]) for side in SPLITS] == [3, 2, 0]


@property_test
@given(texts_lists, st.integers(0, 5), st.integers(0, 5), st.integers(1, 9), st.sets(st.integers(0, 60)))
def test_count_takes_the_first_documents(texts, val, test, length, resumed_at):
  texts = different(texts)
  found = dealt(config_for('count', val_documents=val, test_documents=test), pieces(texts, length), resumed_at)
  assert {side: joined(found[side]) for side in SPLITS} == {
      'val': texts[:val], 'test': texts[val:val + test], 'train': texts[val + test:]}


copies = st.lists(st.sampled_from(['one', 'two two', 'three', 'the fourth one']), min_size=2, max_size=30)


@property_test
@given(copies, percents, st.integers(1, 4), st.sampled_from(['document', 'tail', 'count']), st.booleans(),
       st.sets(st.integers(0, 60)))
def test_copies_are_in_one_split(texts, fractions, num_val, split, pairs, resumed_at):
  documents = [Document(str(i), text, 'answer' if pairs else None) for i, text in enumerate(texts)]
  found = dealt(config_for(split, *fractions, val_documents=num_val), documents, resumed_at)
  parts = {side: [(d.text, d.answer) for d in found[side]] for side in SPLITS}
  assert not set(parts['train']) & set(parts['val']) and not set(parts['train']) & set(parts['test'])
  assert not set(parts['val']) & set(parts['test'])
  assert sum(map(len, (t for side in SPLITS for t, _ in parts[side]))) == sum(map(len, texts)), 'text is lost'


@property_test
@given(st.lists(st.integers(0, 9), min_size=40, max_size=200), st.integers(5, 40))
def test_tail_keeps_the_size_of_validation_with_copies(numbers, val):
  texts = ['the same text' if number else f'text {i}' for i, number in enumerate(numbers)]
  found = dealt(config_for('tail', val), [Document('', text) for text in texts])
  held = sum(len(d.text) for d in found['val'])
  assert 0 < held <= sum(map(len, texts)) * val / 100 + 1


# From files to stores.

def test_tail_splits_files_three_ways(tmp_path):
  text = ''.join(write_corpus(tmp_path / 'corpus', 6).values())
  found = sides_of(config_of(tmp_path, split='tail', val_fraction=0.25, test_fraction=0.15), SPLITS)
  a, b = int(len(text) * 0.6), len(text) - round(len(text) * 0.15)
  assert [''.join(side) for side in found] == [text[:a], text[a:b], text[b:]]


def test_document_split_survives_renamed_and_added_files(tmp_path):
  texts = [f'document {i}' for i in range(200)]
  rng, found = random.Random(0), []
  for name, added in (('a', 0), ('b', 30)):
    more = [f'added {i}' for i in range(added)]
    lines = rng.sample(texts + more, len(texts + more))
    for i in range(0, len(lines), 40):
      jsonl(tmp_path / name / f'{name}{i}.jsonl', [{'text': line} for line in lines[i:i + 40]])
    sides = sides_of(config_of(tmp_path, path=str(tmp_path / name), split='document', test_fraction=0.2), SPLITS)
    assert sorted(t for side in sides for t in side) == sorted(lines)
    found.append([set(side) & set(texts) for side in sides])
  assert found[0] == found[1]
  assert all(len(side) > 20 for side in found[0])


@pytest.mark.parametrize('split', ['auto', 'document', 'tail', 'count'])
def test_val_path_and_test_path_give_those_splits(tmp_path, split):
  path, *others = [list(write_corpus(tmp_path / name, 30, seed=i).values()) for i, name in enumerate(SPLITS)]
  paths = {f'{side}_path': str(tmp_path / side) for side in SPLITS[1:]}
  options = {'path': str(tmp_path / 'train'), 'split': split, 'val_documents': 5, 'test_documents': 5,
             'test_fraction': 0.2}
  assert sides_of(config_of(tmp_path, **options, **paths), SPLITS) == [path, *others]
  # If one of them is given, the other is still split off.
  train, val, test = sides_of(config_of(tmp_path, **options, test_path=paths['test_path']), SPLITS)
  assert test == others[1]
  assert val
  assert sorted(''.join(train + val)) == sorted(''.join(path))


def test_auto_splits_by_document_from_20_validation_documents(tmp_path):
  for num_files, cut in ((199, True), (200, False)):
    for i in range(num_files):
      (tmp_path / 'corpus').mkdir(exist_ok=True)
      (tmp_path / f'corpus/{i:03}.txt').write_text(f'this is the text {i}')
    data = open_data(config_of(tmp_path, val_fraction=0.1))
    train, val = (texts_of(side['data'], data.tokenizer) for side in (data.train, data.val))
    whole = [(tmp_path / f'corpus/{i:03}.txt').read_text() for i in range(num_files)]
    assert (''.join(train + val) == ''.join(whole)) == cut
    assert sorted(''.join(train + val)) == sorted(''.join(whole))

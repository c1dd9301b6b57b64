"""The name that a mistyped or shortened one most likely means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SHORTEST = 3  # letters of a part of a name that counts as one


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
  """The best of the known names; None if none resembles `name`.

  First come names with the same letters, then those with all words of `name`, as warmup_cosine for cosine, then those
  that contain it, then a similar spelling, and last those of which all words are in `name`, as sgd for sgd_momentum.
  """
  known = list(known)
  words, letters = words_of(name), letters_of(name)
  for near in ([k for k in known if letters and letters_of(k) == letters],
               [k for k in known if words and words <= words_of(k)],
               [k for k in known if len(letters) >= SHORTEST and letters in letters_of(k)],
               difflib.get_close_matches(name, known, n=1, cutoff=cutoff),
               [k for k in known if words_of(k) and words_of(k) <= words]):
    if near:
      return difflib.get_close_matches(name.lower(), near, n=1, cutoff=0)[0]
  return None


def words_of(name: str) -> set[str]:
  return {word for word in re.split(r'[\W_]+', name.lower()) if len(word) >= SHORTEST or word.isdigit()}


def letters_of(name: str) -> str:
  return re.sub(r'[\W_]+', '', name.lower())

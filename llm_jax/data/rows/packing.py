"""Best-fit-decreasing packing (arXiv 2404.10830), computed on the histogram of sizes: the Python loops run over sizes
and distinct fillings of a row, not over pieces, so ten million pieces take seconds."""

from __future__ import annotations

import bisect

import numpy as np

Filling = tuple[tuple[int, int], ...]  # contents of a row: (size, number of pieces of that size), sizes descending


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
  """(order int64 [P], ends int64 [R]): row r holds pieces order[ends[r - 1]:ends[r]]. Sizes must be in [1, capacity].

  Each piece, largest first, goes to the row where it leaves the least room. Pieces of equal size keep their order.
  """
  narrow = sizes.astype(np.uint16) if capacity < 1 << 16 else sizes  # NumPy sorts uint16 by radix sort
  by_size = np.argsort(narrow, kind='stable')
  counts = np.bincount(sizes, minlength=capacity + 1)
  dealt = (np.cumsum(counts) - counts).tolist()
  order, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  for num_rows, filling in fillings(counts, capacity):
    columns = []
    for size, times in filling:
      columns.append(by_size[dealt[size]:dealt[size] + num_rows * times].reshape(num_rows, times))
      dealt[size] += num_rows * times
    pieces = np.concatenate(columns, axis=1)
    order.append(pieces.ravel())
    lengths.append(np.full(num_rows, pieces.shape[1]))
  return np.concatenate(order), np.cumsum(np.concatenate(lengths))


def fillings(counts: np.ndarray, capacity: int) -> list[tuple[int, Filling]]:
  """(number of rows, their filling) of a best-fit-decreasing packing of `counts[size]` pieces of each size."""
  rooms: list[int] = []  # the different amounts of free room among the rows so far, ascending
  rows: dict[int, list[tuple[int, Filling]]] = {}  # by room
  for size in np.flatnonzero(counts)[::-1].tolist():
    left, filled = int(counts[size]), []
    at = bisect.bisect_left(rooms, size)
    while left and at < len(rooms):
      room, groups = rooms[at], rows[rooms[at]]
      while left and groups:
        num_rows, filling = groups.pop()
        left, parts = _fill(size, left, room, num_rows, filling)
        filled += parts
      if not groups:
        del rooms[at], rows[room]
    if left:
      _, parts = _fill(size, left, capacity, -(-left // (capacity // size)), ())
      filled += parts
    for room, num_rows, filling in filled:
      if room not in rows:
        bisect.insort(rooms, room)
      rows.setdefault(room, []).append((num_rows, filling))
  return [group for room in rooms for group in rows[room]]


def _fill(size: int, left: int, room: int, num_rows: int, filling: Filling) -> tuple[int, list]:
  """Puts up to `left` pieces into `num_rows` equal rows. Returns (pieces left, rows as (room, number, filling))."""
  times = room // size  # a row that took a piece is the best fit for the next one too, until it is full
  full = min(num_rows, left // times)
  rest = left - full * times if full < num_rows else 0
  parts = [(room - n * size, m, (*filling, (size, n)) if n else filling)
           for m, n in ((full, times), (1, rest) if rest else (0, 0), (num_rows - full - bool(rest), 0)) if m]
  return left - full * times - rest, parts

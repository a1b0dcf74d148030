"""Texts laid into rows: the batches that encoders read.

The responses to a prompt are to be compared, so they lie in one batch; but each is a text of its own there, and
lengths differ much. Rows that are filled up with several texts hold little padding, where rows of one text each, as
wide as the longest one, would be half padding in steps of a few pairs.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tsalign_jax.data.batching import part_size, round_up
from tsalign_jax.data.packing import PLANNED, SMALLEST, Item, plan
from tsalign_jax.types import Texts


class Text(NamedTuple):
  """A prompt with one response, as tokens, and the type of each token."""

  tokens: Sequence[int]
  types: Sequence[int]


def make_texts(
  items: Sequence[Sequence[Text]], rows: Sequence[Sequence[tuple[int, int]]], columns: int, texts: int, room: int
) -> Texts:
  """Rows of (item, text of it), each at most so many columns and texts, as arrays that have room for so many items."""

  def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)

  four = (zeros(len(rows), columns) for _ in range(4))
  out = Texts(*four, first=zeros(len(rows), texts), place=zeros(room, len(items[0])))
  for row, held in enumerate(rows):
    column = 0
    for number, (item, k) in enumerate(held):
      text = items[item][k]
      at = slice(column, column + len(text.tokens))
      out.tokens[row, at], out.types[row, at] = text
      out.text[row, at], out.position[row, at] = number + 1, range(len(text.tokens))
      out.first[row, number], out.place[item, k] = column, row * texts + number
      column = at.stop
  return out


class TextPacking:
  """The batches of a stage, in rows of one length: of at most `tokens` tokens, and of a multiple of `ways` rows.

  `at_once` is how many items come together. Where `tokens` has no room for a row on each of the `ways` devices, or for
  all texts of an item, a batch is just that.
  """

  def __init__(self, items: Sequence[Sequence[Text]], at_once: int, tokens: int, ways: int):
    self.items, self.ways, self.k = items, ways, len(items[0])
    pieces = [Item([], [text.tokens]) for texts in items for text in texts]
    self.layout, most = plan(pieces, at_once * self.k, tokens, ways, roomy=True)
    self.most = max(most, round_up(max(map(self._rows_alone, range(len(items)))), ways))
    self.room = round_up(min(at_once, self.most * self.layout.items // self.k), ways)

  def batches(self, indices: Sequence[int]) -> Iterator[tuple[Texts, Int[np.ndarray, " items"]]]:
    """Batches that hold these items, and which item is in which place of theirs: -1 where there is none."""
    for start in range(0, len(indices), PLANNED // self.k):
      yield from self._together(indices[start : start + PLANNED // self.k])

  def _rows_alone(self, index: int) -> int:
    """How many rows an item needs that has a batch for itself."""
    batch = _Batch(self.layout.length, self.k, 1)
    batch.take(index, self._lengths(index))
    return len(batch.rows)

  def _lengths(self, index: int) -> list[int]:
    return [len(text.tokens) for text in self.items[index]]

  def _together(self, indices: Sequence[int]) -> Iterator[tuple[Texts, Int[np.ndarray, " items"]]]:
    """Each item in the first batch that has room for it, largest items first."""
    found: list[_Batch] = []
    for index in sorted(indices, key=lambda index: (-sum(self._lengths(index)), index)):
      lengths = self._lengths(index)
      if not any(batch.take(index, lengths) for batch in found):
        found.append(_Batch(self.layout.length, self.most, self.room))
        found[-1].take(index, lengths)
    for batch in found:
      rows = batch.rows + [[]] * (part_size(len(batch.rows), self.most, self.ways) - len(batch.rows))
      items = [self.items[index] for index in batch.items]
      texts = make_texts(items, rows, self.layout.length, self.layout.items, self.room)
      yield texts, np.asarray(batch.items + [-1] * (self.room - len(items)))


class _Batch:
  """What lies in a batch: indices of items, and rows of (which of these items, which text of it)."""

  def __init__(self, length: int, most: int, room: int):
    self.items: list[int] = []
    self.rows: list[list[tuple[int, int]]] = []
    self._length, self._most, self._room = length, most, room
    self._left: list[int] = []  # tokens that each row can still take

  def take(self, index: int, lengths: Sequence[int]) -> bool:
    """Puts each text of an item in the first row that has room for it; False, and nothing, where that cannot be."""
    left, places = self._left.copy(), []
    for length in lengths:
      taken = max(length, SMALLEST)  # so that no row holds more texts than it may
      row = next((row for row, free in enumerate(left) if free >= taken), len(left))
      places.append(row)
      if row == len(left):
        left.append(self._length)
      left[row] -= taken
    if len(left) > self._most or len(self.items) == self._room:
      return False
    self.rows += [[] for _ in left[len(self.rows) :]]
    for k, row in enumerate(places):
      self.rows[row].append((len(self.items), k))
    self.items.append(index)
    self._left = left
    return True

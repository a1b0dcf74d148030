"""Texts in rows: all of each item in one batch, within limits, and next to each other without much padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from tsalign_jax.data.texts import Text, TextPacking, make_texts


def items_of(lengths) -> list[list[Text]]:
  """Texts of these lengths, each token a number that no other has."""
  count = iter(range(1, 1 << 20))
  numbered = [[[next(count) for _ in range(length)] for length in row] for row in lengths]
  return [[Text(tokens, [token % 2 for token in tokens]) for tokens in row] for row in numbered]


def test_a_batch_is_what_its_docstring_shows():
  items = [[Text([1, 8, 9, 2, 4, 5, 2], [0, 0, 0, 0, 1, 1, 1])], [Text([1, 6, 2, 7, 2], [0, 0, 0, 1, 1])]]
  found = make_texts(items, [[(0, 0)], [], [(1, 0)]], 7, 2, 3)
  assert found.tokens.tolist() == [[1, 8, 9, 2, 4, 5, 2], [0] * 7, [1, 6, 2, 7, 2, 0, 0]]
  together = make_texts(items, [[(0, 0), (1, 0)]], 13, 3, 2)
  assert together.tokens.tolist() == [[1, 8, 9, 2, 4, 5, 2, 1, 6, 2, 7, 2, 0]]
  assert together.types.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0]]
  assert together.text.tolist() == [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]
  assert together.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0]]
  assert together.first.tolist() == [[0, 7, 0]] and together.place.tolist() == [[0], [1]]
  assert found.place.tolist() == [[0], [4], [0]]


@settings(deadline=None)
@given(
  lengths=some.integers(1, 3).flatmap(
    lambda k: some.lists(some.lists(some.integers(1, 300), min_size=k, max_size=k), min_size=1, max_size=25)
  ),
  at_once=some.integers(1, 30),
  tokens=some.sampled_from([256, 1024, 4096]),
  ways=some.sampled_from([1, 2, 8]),
)
def test_each_item_lies_whole_in_one_batch(lengths, at_once, tokens, ways):
  items, k = items_of(lengths), len(lengths[0])
  packing, found = TextPacking(items, at_once, tokens, ways), []
  shapes = set()
  for start in range(0, len(items), at_once):
    for texts, place in packing.batches(range(start, min(start + at_once, len(items)))):
      rows, columns = texts.tokens.shape
      shapes.add(texts.tokens.shape)
      assert rows % ways == 0 and len(place) % ways == 0 and texts.place.shape == (len(place), k)
      assert texts.tokens.size <= max(tokens, max(k, ways) * columns, -(-k // ways) * ways * columns)
      each = texts.first.shape[1]
      for index, where in zip(place, texts.place, strict=True):
        if index < 0:
          continue
        found.append(index)
        for text, at in zip(items[index], where, strict=True):
          row, number = divmod(at, each)
          own = texts.text[row] == number + 1
          assert texts.tokens[row, own].tolist() == text.tokens and texts.types[row, own].tolist() == text.types
          assert texts.position[row, own].tolist() == [*range(len(text.tokens))]
          assert texts.first[row, number] == np.flatnonzero(own)[0]
      assert (texts.text > 0).sum() == sum(len(text.tokens) for index in place if index >= 0 for text in items[index])
  assert sorted(found) == [*range(len(items))] and len(shapes) <= 2


def test_more_items_than_are_laid_out_together_come_in_turn(monkeypatch):
  monkeypatch.setattr("tsalign_jax.data.texts.PLANNED", 10)
  items = items_of([[20, 30]] * 23)
  placed = [place[place >= 0].tolist() for _, place in TextPacking(items, 23, 1024, 1).batches(range(23))]
  assert sorted(itertools.chain(*placed)) == [*range(23)] and set(placed[0]) <= set(range(5))


@pytest.mark.parametrize(("at_once", "tokens", "ways"), [(32, 4096, 1), (64, 8192, 1), (256, 32768, 8)])
def test_steps_of_real_lengths_have_little_padding(at_once, tokens, ways):
  """Conversations of very different lengths, up to what an encoder reads."""
  random = np.random.default_rng(0)
  draw = lambda mean: int(random.lognormal(mean, 0.8)) + 1  # noqa: E731
  prompts = [draw(4.5) for _ in range(1100)]
  lengths = [[min(512, prompt + draw(4)), min(512, prompt + draw(4))] for prompt in prompts]
  packing, order = TextPacking(items_of(lengths), at_once, tokens, ways), random.permutation(1100).tolist()
  computed = read = 0
  for start in range(0, len(order) - at_once + 1, at_once):
    for texts, _ in packing.batches(order[start : start + at_once]):
      assert texts.tokens.size <= tokens
      computed, read = computed + texts.tokens.size, read + (texts.text > 0).sum()
  assert 1 - read / computed < 0.15

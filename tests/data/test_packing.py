"""Packed rows hold every item once, as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsalign_jax.data.packing import MULTIPLE, SHORT, Item, Packing, assign, pack, plan, row_length

tokens = st.lists(st.integers(1, 90), min_size=0, max_size=60)
items = st.lists(
  st.builds(Item, st.lists(st.integers(1, 90), min_size=1, max_size=80), st.tuples(tokens, tokens)),
  min_size=1,
  max_size=12,
)


@given(items)
def test_every_item_is_in_one_row_and_reads_back(items):
  layout, _ = plan(items, len(items), 1 << 20, 1)
  rows = assign(items, range(len(items)), layout)
  assert sorted(index for row in rows for index in row) == list(range(len(items)))
  packed = pack([[items[index] for index in row] for row in rows], layout)
  assert packed.tokens.shape == (len(rows), layout.length)
  assert layout.length in SHORT or layout.length % MULTIPLE == 0
  for row, indices in enumerate(rows):
    for number, index in enumerate(indices):
      for branch, expected in enumerate((items[index].prompt, *items[index].responses)):
        columns = np.flatnonzero((packed.item[row] == number + 1) & (packed.branch[row] == branch))
        assert packed.tokens[row, columns].tolist() == list(expected)
        start = len(items[index].prompt) if branch else 0
        assert packed.position[row, columns].tolist() == list(range(start, start + len(expected)))


@given(items, st.integers(1, 3), st.integers(1, 4))
def test_each_response_token_is_predicted_by_the_token_before_it(items, ways, rows):
  packing = Packing(items, len(items), rows * 512, ways)
  found, layout = [], packing.layout
  for packed, place in packing.batches(range(len(items))):
    assert packed.target.shape == (ways, layout.targets_of(len(place) // ways))
    of_shard = packed.tokens.reshape(ways, -1)
    used = 0
    for row, number in np.argwhere(place >= 0):
      item, shard, row_of_shard = items[place[row, number]], *divmod(row, len(place) // ways)
      found.append(place[row, number])
      for branch, response in enumerate(item.responses):
        owner = (row_of_shard * layout.items + number) * 2 + branch
        mine = np.flatnonzero(packed.owner[shard] == owner)
        assert packed.target[shard, mine].tolist() == list(response)
        before = [item.prompt[-1], *response]
        assert of_shard[shard, packed.predictor[shard, mine]].tolist() == before[: len(response)]
        assert packed.length[row, number, branch] == len(response)
        used += len(response)
    unused = packed.owner == packed.length[: len(place) // ways].size
    assert unused.sum() == packed.target.size - used
  assert sorted(found) == list(range(len(items)))


def test_more_items_than_are_planned_together_are_laid_out_in_turn(monkeypatch):
  monkeypatch.setattr("tsalign_jax.data.packing.PLANNED", 5)
  random = np.random.default_rng(0)
  items = [Item([1] * random.integers(1, 80), ([2] * random.integers(1, 60),) * 2) for _ in range(23)]
  packing = Packing(items, len(items), 1024, 1)
  order = random.permutation(23).tolist()
  placed = [place[place >= 0].tolist() for _, place in packing.batches(order)]
  assert sorted(index for batch in placed for index in batch) == list(range(23))
  assert set(placed[0]) <= set(order[:5])


def test_batches_have_room_for_the_response_tokens_that_rows_usually_have():
  random = np.random.default_rng(0)
  items = [Item([1] * 120, ([1] * length, [1])) for length in random.integers(1, 300, 64)]
  packing = Packing(items, len(items), 4096, 1)
  sizes = [(len(place), packed.target.size) for packed, place in packing.batches(range(64))]
  rows, targets = np.sum(sizes, axis=0)
  assert rows <= len(assign(items, range(64), packing.layout)) + packing.most // 2
  assert sum(item.targets for item in items) < targets < 0.85 * rows * packing.layout.targets


@pytest.mark.parametrize(("at_once", "tokens", "ways"), [(32, 2048, 1), (32, 4096, 1), (64, 8192, 1), (256, 16384, 8)])
def test_steps_of_real_lengths_have_little_padding(at_once, tokens, ways):
  """Conversations of very different lengths, in the batches that they are trained on."""
  random = np.random.default_rng(0)
  draw = lambda mean: [1] * (int(random.lognormal(mean, 0.8)) + 1)  # noqa: E731
  items = [Item(draw(4.5), (draw(4), draw(4))) for _ in range(1100)]
  items = [item for item in items if item.tokens <= 1024]
  packing, order = Packing(items, at_once, tokens, ways), random.permutation(len(items)).tolist()
  computed = read = 0
  shapes = set()
  for start in range(0, len(order) - at_once + 1, at_once):
    step = order[start : start + at_once]
    batches = [packed.tokens for packed, _ in packing.batches(step)]
    assert all(batch.size <= tokens and len(batch) % ways == 0 for batch in batches)
    shapes |= {batch.shape for batch in batches}
    computed, read = computed + sum(map(np.size, batches)), read + sum(items[index].tokens for index in step)
  assert 1 - read / computed < 0.15 and len(shapes) <= 2


def test_a_step_that_nearly_fills_a_batch_leaves_no_empty_one_behind():
  """Of 15 rows a step, 14 at once would leave a batch of 7 with a single row in it."""
  items = [Item([1] * 200, ([1] * 30, [1] * 20)) for _ in range(15)]  # one to a row of 256
  packing = Packing(items, 15, 14 * 256, 1)
  assert packing.layout.length == 256
  assert sum(len(place) for _, place in packing.batches(range(15))) == 15


def test_items_that_come_together_are_as_many_batches_as_their_rows_make():
  """Response tokens that do not divide by the rows: 257 in two rows."""
  prompts, responses = (36, 37, 38, 25, 16, 34), (41, 42, 53, 39, 39, 43)
  items = [Item([1] * prompt, ([2] * targets,)) for prompt, targets in zip(prompts, responses, strict=True)]
  assert [len(place) for _, place in Packing(items, 6, 1 << 20, 1).batches(range(6))] == [2]


def test_rows_are_not_longer_than_a_batch_may_be():
  items = [Item([1] * 40, ([1] * 30, [1] * 30)) for _ in range(64)]
  assert plan(items, 5, 1 << 20, 1)[0].length == 512  # five of them fit
  for tokens, ways in ((256, 1), (4 * 256, 4)):
    assert plan(items, 5, tokens, ways)[0].length == 256


def test_rows_are_longer_than_the_longest_item_where_two_would_not_fit():
  for tokens, length in ((130, 512), (250, 256)):  # 256 tokens hold one of 130, 384 hold two, 512 hold three
    alike = [Item([1] * (tokens - 80), ([1] * 50, [1] * 30))] * 64
    assert plan(alike, 32, 1 << 20, 1)[0].length == length


@given(st.integers(1, 20_000))
def test_no_shorter_row_would_hold_as_much(tokens):
  length = row_length(tokens)
  assert tokens <= length and row_length(length) == length
  assert length == 256 or length - tokens < (128 if length <= 640 else 256)

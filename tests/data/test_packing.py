"""Packed rows hold every item once, as it was."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tsalign_jax.data.packing import MULTIPLE, Item, Packing, assign, pack, plan_layout

tokens = st.lists(st.integers(1, 90), min_size=0, max_size=60)
items = st.lists(
  st.builds(Item, st.lists(st.integers(1, 90), min_size=1, max_size=80), st.tuples(tokens, tokens)),
  min_size=1,
  max_size=12,
)


@settings(deadline=None)
@given(items)
def test_every_item_is_in_one_row_and_reads_back(items):
  layout = plan_layout(items, len(items))
  rows = assign(items, range(len(items)), layout)
  assert sorted(index for row in rows for index in row) == list(range(len(items)))
  packed = pack([[items[index] for index in row] for row in rows], layout)
  assert packed.tokens.shape == (len(rows), layout.length) and layout.length % MULTIPLE == 0
  for row, indices in enumerate(rows):
    for number, index in enumerate(indices):
      for branch, expected in enumerate((items[index].prompt, *items[index].responses)):
        columns = np.flatnonzero((packed.item[row] == number + 1) & (packed.branch[row] == branch))
        assert packed.tokens[row, columns].tolist() == list(expected)
        start = len(items[index].prompt) if branch else 0
        assert packed.position[row, columns].tolist() == list(range(start, start + len(expected)))


@settings(deadline=None)
@given(items, st.integers(1, 3), st.integers(1, 4))
def test_each_response_token_is_predicted_by_the_token_before_it(items, ways, rows):
  packing = Packing(items, len(items), rows * plan_layout(items, len(items)).length, ways)
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


def test_batches_have_room_for_the_response_tokens_that_rows_usually_have():
  random = np.random.default_rng(0)
  items = [Item([1] * 120, ([1] * length, [1])) for length in random.integers(1, 300, 64)]
  packing = Packing(items, len(items), 4096, 1)
  sizes = [(len(place), packed.target.size) for packed, place in packing.batches(range(64))]
  rows, targets = np.sum(sizes, axis=0)
  assert rows <= len(assign(items, range(64), packing.layout)) + packing.most // 2
  assert sum(item.targets for item in items) < targets < 0.85 * rows * packing.layout.targets


def test_rows_of_real_lengths_have_little_padding():
  random = np.random.default_rng(0)
  draw = lambda mean: [1] * (int(random.lognormal(mean, 0.8)) + 1)  # noqa: E731
  items = [Item(draw(4.5), (draw(4), draw(4))) for _ in range(500)]
  items = [item for item in items if item.tokens <= 1024]
  layout = plan_layout(items, len(items))
  rows = assign(items, range(len(items)), layout)
  padding = 1 - sum(item.tokens for item in items) / (len(rows) * layout.length)
  assert padding < 0.08


def test_rows_are_longer_than_the_longest_item_where_two_would_not_fit():
  alike = [Item([1] * 100, ([1] * 90, [1] * 80))] * 64
  assert plan_layout(alike, 32).length > 2 * MULTIPLE  # 512 tokens would hold one of 270
  assert plan_layout([Item([1] * 90, ([1] * 80, [1] * 80))] * 64, 32).length == MULTIPLE

"""Packed rows hold every item once, as it was."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tsalign_jax.data.packing import MULTIPLE, Item, assign, pack, plan_layout

tokens = st.lists(st.integers(1, 90), min_size=0, max_size=60)
items = st.lists(
  st.builds(Item, st.lists(st.integers(1, 90), min_size=1, max_size=80), st.tuples(tokens, tokens)),
  min_size=1,
  max_size=12,
)


@settings(deadline=None)
@given(items)
def test_every_item_is_in_one_row_and_reads_back(items):
  layout = plan_layout(items)
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
@given(items)
def test_each_response_token_is_predicted_by_the_token_before_it(items):
  layout = plan_layout(items)
  rows = assign(items, range(len(items)), layout)
  packed = pack([[items[index] for index in row] for row in rows], layout)
  for row, indices in enumerate(rows):
    for number, index in enumerate(indices):
      for branch, response in enumerate(items[index].responses):
        mine = np.flatnonzero(packed.owner[row] == number * 2 + branch)
        assert packed.target[row, mine].tolist() == list(response)
        before = [items[index].prompt[-1], *response]
        assert packed.tokens[row, packed.predictor[row, mine]].tolist() == before[: len(response)]
        assert packed.length[row, number, branch] == len(response)
    unused = packed.owner[row] == layout.items * layout.k
    assert unused.sum() == layout.targets - sum(items[index].targets for index in indices)


def test_rows_of_real_lengths_have_little_padding():
  random = np.random.default_rng(0)
  draw = lambda mean: [1] * (int(random.lognormal(mean, 0.8)) + 1)  # noqa: E731
  items = [Item(draw(4.5), (draw(4), draw(4))) for _ in range(500)]
  items = [item for item in items if item.tokens <= 1024]
  layout = plan_layout(items)
  rows = assign(items, range(len(items)), layout)
  padding = 1 - sum(item.tokens for item in items) / (len(rows) * layout.length)
  assert padding < 0.08

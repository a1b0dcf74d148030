"""Prompts with their responses laid into rows of one length: the batches that models are trained on.

Lengths differ much, in two directions: prompts, and responses. Rows that are filled up with whole items waste a few
tokens in a hundred, where padding each prompt and each response to one width would waste most of them; and all rows of
a stage have one layout, so few programs are compiled.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tsalign_jax.data.batching import part_sizes, round_up
from tsalign_jax.types import Packed

SHORT = (256, 384, 512, 640)  # tokens; rows of these lengths can be one block of the kernel
MULTIPLE = 256  # tokens; longer rows are as long as a multiple of it, so that blocks divide them
SMALLEST = 16  # tokens; a row holds as many items as if they were of this size
ATTENTION = 2048  # tokens of a row at which attention costs as much as all the rest, about
CALL = 256  # tokens; to compute one more batch costs as much as so many more tokens, about
RELUCTANCE = 1.1  # by how much longer rows must be cheaper: else rounds would change lengths, and compile anew
SEEN = 512  # items that a layout is chosen by
PLANNED = 2048  # items that are laid into rows together: of more, each would take longer, and spare no room


class Item(NamedTuple):
  """A prompt with K responses, as tokens."""

  prompt: Sequence[int]
  responses: Sequence[Sequence[int]]

  @property
  def targets(self) -> int:
    """Tokens of all responses."""
    return sum(map(len, self.responses))

  @property
  def tokens(self) -> int:
    """Tokens of prompt and responses."""
    return len(self.prompt) + self.targets


class Layout(NamedTuple):
  """What every row of a stage holds at most: tokens, of them response tokens, and items of K responses each.

  Rows differ in their response tokens more than batches do, so a batch has room for what several rows usually hold.
  """

  length: int
  targets: int
  usual_targets: int
  items: int
  k: int

  def targets_of(self, rows: int) -> int:
    """The response tokens that so many rows hold together at most."""
    usual = round_up(max(self.targets, rows * self.usual_targets), self.length // 16)
    return min(rows * self.targets, usual)


def plan(items: Sequence[Item], at_once: int, tokens: int, ways: int, *, roomy: bool = False) -> tuple[Layout, int]:
  """The layout for these items, of which `at_once` come together, and how many rows a batch has at most.

  Together they make steps cheap: short rows attend less, and long ones have less room left over, as of rows that hold
  one and a half items a third is padding; and a batch that is nearly as large as a step leaves a large last one nearly
  empty. All comes in coarse steps, so that the stages of the next round, whose items are alike, mostly get the same.
  `roomy` rows may hold response tokens only.
  """
  steps = _likely_steps(len(items), at_once)
  shortest = length = row_length(max(item.tokens for item in items))
  longest = max(shortest, min(2 * shortest, tokens // ways))
  best, least = (shortest, ways), float("inf")
  while length <= longest:
    rows = [len(assign(items, step, _roomy(length, 0))) for step in steps]
    for most in range(ways, max(ways, tokens // length) + 1, ways):
      parts = [part_sizes(count, most, ways) for count in rows]
      computed = row_cost(sum(map(sum, parts)) * length, length) + CALL * sum(map(len, parts))
      cost = computed * (1.0 if length == shortest else RELUCTANCE)
      if cost <= least:
        best, least = (length, most), cost
    length = row_length(length + 1)
  length, most = best
  layout = _roomy(length, len(items[0].responses))
  return (layout if roomy else _fitted(layout, items, steps)), most


def row_length(tokens: int) -> int:
  """The length of the shortest rows that hold so many tokens."""
  return next((length for length in SHORT if tokens <= length), round_up(tokens, MULTIPLE))


def row_cost(tokens: int, length: int) -> float:
  """What so many tokens cost in rows of this length, attention included: in tokens that attend to nothing."""
  return tokens * (1 + length / ATTENTION)


def _likely_steps(items: int, at_once: int) -> list[list[int]]:
  """Items that could come together: of epochs in random order, until `SEEN` items have come; or all, if all do."""
  if items <= min(at_once, PLANNED):
    return [list(range(items))]
  random, steps, at_once = np.random.default_rng(0), [], min(at_once, PLANNED)
  while len(steps) * at_once < SEEN:
    order = random.permutation(items)[:SEEN].tolist()
    steps += [order[start : start + at_once] for start in range(0, len(order), at_once)]
  return steps


def _roomy(length: int, k: int) -> Layout:
  return Layout(length, length, length, length // SMALLEST, k)


def _fitted(layout: Layout, items: Sequence[Item], steps: Sequence[Sequence[int]]) -> Layout:
  """The layout with room for as many response tokens as rows, and batches of them, usually hold."""
  length = layout.length
  share = sum(item.targets for item in items) / sum(item.tokens for item in items)
  most = max(max(item.targets for item in items), int(1.15 * share * length))
  usual = max(sum(items[index].targets for index in step) / len(assign(items, step, layout)) for step in steps)
  targets, usual = (min(length, round_up(count, length // 16)) for count in (most, math.ceil(usual)))
  return layout._replace(targets=targets, usual_targets=usual)


def assign(items: Sequence[Item], indices: Iterable[int], layout: Layout) -> list[list[int]]:
  """Rows of indices: each item in the first row that has room for it, largest items first."""
  order = sorted(indices, key=lambda index: (-items[index].tokens, index))
  rows: list[list[int]] = []
  # Tokens, response tokens and items that each row can still take; there are no more rows than items.
  room = np.tile([layout.length, layout.targets, layout.items], (len(order), 1))
  for index in order:
    needs = [items[index].tokens, items[index].targets, 1]
    place = int((room[: len(rows) + 1] >= needs).all(axis=1).argmax())
    if place == len(rows):
      rows.append([])
    rows[place].append(index)
    room[place] -= needs
  return rows


class Packing:
  """The packed batches of a stage: of one layout, of at most `tokens` tokens, and of a multiple of `ways` rows.

  `at_once` is how many items come together. Where `tokens` has room for more, batches are smaller: empty rows cost
  as much as full ones. Where it has no room for a row on each of the `ways` devices, a batch is just that. `roomy` rows
  may hold response tokens only, so that one or two programs serve all items.
  """

  def __init__(self, items: Sequence[Item], at_once: int, tokens: int, ways: int, *, roomy: bool = False):
    self.items, self.ways = items, ways
    self.layout, self.most = plan(items, at_once, tokens, ways, roomy=roomy)

  def batches(self, indices: Sequence[int]) -> Iterator[tuple[Packed, Int[np.ndarray, "rows items"]]]:
    """Packed batches that hold these items, and which item is where: -1 where there is none."""
    for start in range(0, len(indices), PLANNED):
      yield from self._together(indices[start : start + PLANNED])

  def _together(self, indices: Sequence[int]) -> Iterator[tuple[Packed, Int[np.ndarray, "rows items"]]]:
    rows = assign(self.items, indices, self.layout)
    sizes = [size // self.ways for size in part_sizes(len(rows), self.most, self.ways)]
    loads = [sum(self.items[index].targets for index in row) for row in rows]
    while (shards := share_out(loads, self.ways * sizes, self.layout)) is None:
      sizes.append(sizes[-1])
    for batch, size in enumerate(sizes):
      part = []
      for shard in shards[batch :: len(sizes)]:
        part += [rows[row] for row in shard] + [[]] * (size - len(shard))
      place = np.asarray([row + [-1] * (self.layout.items - len(row)) for row in part])
      yield pack([[self.items[index] for index in row] for row in part], self.layout, self.ways), place


def share_out(loads: Sequence[int], sizes: Sequence[int], layout: Layout) -> list[list[int]] | None:
  """Rows with so many response tokens each, evenly shared out to shards of so many rows; None if they do not fit."""
  shards: list[list[int]] = [[] for _ in sizes]
  room = [layout.targets_of(size) for size in sizes]
  for row in sorted(range(len(loads)), key=lambda row: (-loads[row], row)):
    shard = max((shard for shard, size in enumerate(sizes) if len(shards[shard]) < size), key=lambda shard: room[shard])
    if room[shard] < loads[row]:
      return None
    shards[shard].append(row)
    room[shard] -= loads[row]
  return shards


def pack(rows: Sequence[Sequence[Item]], layout: Layout, ways: int = 1) -> Packed:
  """Rows of items as arrays, the response tokens apart in `ways` shards of as many rows each; rows may be empty."""
  packed, target = _blank(len(rows), layout, ways), 0
  for row, held in enumerate(rows):
    column = 0
    target = target if row % (len(rows) // ways) else 0
    for number, item in enumerate(held):
      column, target = _place(packed, row, column, target, number, item)
  return packed


def _place(packed: Packed, row: int, column: int, target: int, number: int, item: Item) -> tuple[int, int]:
  """Writes one item from `column` of its row and `target` of its shard on; where the next one begins."""
  rows, length = packed.tokens.shape
  _, items, k = packed.length.shape
  shard, row_of_shard = divmod(row, rows // len(packed.target))
  start, trunk = column, len(item.prompt)
  for branch, tokens in enumerate((item.prompt, *item.responses)):
    end = column + len(tokens)
    packed.tokens[row, column:end] = tokens
    packed.item[row, column:end] = number + 1
    packed.branch[row, column:end] = branch
    first = 0 if branch == 0 else trunk
    packed.position[row, column:end] = np.arange(first, first + len(tokens))
    if branch:
      stop = target + len(tokens)
      predictor = np.asarray([start + trunk - 1, *range(column, end - 1)][: len(tokens)], np.int32)
      packed.target[shard, target:stop] = tokens
      packed.predictor[shard, target:stop] = row_of_shard * length + predictor
      packed.owner[shard, target:stop] = (row_of_shard * items + number) * k + branch - 1
      packed.length[row, number, branch - 1] = len(tokens)
      target = stop
    column = end
  return column, target


def _blank(rows: int, layout: Layout, ways: int) -> Packed:
  def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)

  size = rows // ways
  targets = layout.targets_of(size)
  return Packed(
    tokens=zeros(rows, layout.length),
    position=zeros(rows, layout.length),
    item=zeros(rows, layout.length),
    branch=zeros(rows, layout.length),
    target=zeros(ways, targets),
    predictor=zeros(ways, targets),
    owner=np.full((ways, targets), size * layout.items * layout.k, np.int32),
    length=zeros(rows, layout.items, layout.k),
  )

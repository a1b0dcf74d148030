"""Batches of trunks and branches of different lengths, and the sequences that they stand for."""

import numpy as np

from tsalign_jax.data.packing import Item, Packing
from tsalign_jax.types import Branches, Packed


def ragged_batch(seed: int, *, rows: int = 3, k: int = 3, prompt: int = 9, response: int = 8) -> Branches:
  """Random trunks and branches; the padding holds real-looking tokens on purpose."""
  random = np.random.default_rng(seed)
  return Branches(
    trunk=random.integers(3, 97, (rows, prompt)),
    branches=random.integers(3, 97, (rows, k, response)),
    trunk_length=random.integers(1, prompt + 1, rows),
    branch_length=random.integers(1, response + 1, (rows, k)),
  )


def one_sequence(batch: Branches, row: int, k: int) -> tuple[list[int], list[int]]:
  """(prompt tokens, response tokens) of one branch without padding."""
  prompt = batch.trunk[row, batch.trunk.shape[1] - batch.trunk_length[row] :]
  return prompt.tolist(), batch.branches[row, k, : batch.branch_length[row, k]].tolist()


def ragged_items(seed: int, *, count: int = 5, k: int = 3, prompt: int = 40, response: int = 30) -> list[Item]:
  """Random prompts with responses, of different lengths."""
  random = np.random.default_rng(seed)

  def tokens(longest: int) -> list[int]:
    return random.integers(3, 97, random.integers(1, longest + 1)).tolist()

  return [Item(tokens(prompt), [tokens(response) for _ in range(k)]) for _ in range(count)]


def packed_rows(items: list[Item], tokens: int = 1 << 20, ways: int = 1) -> tuple[Packed, np.ndarray]:
  """The first batch of so many tokens, if not of all items, and which item is where: -1 where there is none."""
  return next(Packing(items, len(items), tokens, ways).batches(range(len(items))))


def real_tokens(batch: Branches | Packed) -> np.ndarray:
  """[batch, tokens, 1, 1]: everything but padding."""
  if isinstance(batch, Packed):
    return (batch.item > 0)[..., None, None]
  branches = np.asarray(batch.branch_mask).reshape(len(batch.trunk), -1)
  return np.concatenate([batch.trunk_mask, branches], axis=1)[..., None, None]

"""Ragged token lists to the static shapes that programs are compiled for."""

from collections.abc import Sequence

import numpy as np

from tsalign_jax.types import Branches


def round_up(length: int, multiple: int) -> int:
  """The next multiple of `multiple`, at least one of it."""
  return max(1, -(-length // multiple)) * multiple


def bucket(length: int, steps: int) -> int:
  """The width that rows of this length are padded to: `steps` multiples of 16, then `steps` / 2 more a doubling.

  There are few such widths, so few programs are compiled; with 8 steps rows get a seventh longer on average, a quarter
  at most; with 4 twice as much, and with 16 half as much.
  """
  step = 16
  while length > steps * step:
    step *= 2
  return round_up(length, step)


def part_size(left: int, most: int, ways: int) -> int:
  """Rows of the next batch: `most`, or half of it where that holds what is left; both are multiples of `ways`.

  So a stage compiles two shapes at most, and fills up the last batch of a step only.
  """
  half = ways * -(-most // (2 * ways))
  return half if left <= half else ways * max(1, most // ways)


def part_sizes(rows: int, most: int, ways: int) -> list[int]:
  """Rows of each of the batches that so many rows are divided into."""
  sizes = []
  while rows > 0:
    sizes.append(part_size(rows, most, ways))
    rows -= sizes[-1]
  return sizes


def pad_left(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
  """[len(rows), width] with each row at the right end and zeros before it."""
  out = np.zeros((len(rows), width), np.int32)
  for index, row in enumerate(rows):
    out[index, width - len(row) :] = row
  return out


def pad_right(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
  """[len(rows), width] with each row at the left end and zeros after it."""
  out = np.zeros((len(rows), width), np.int32)
  for index, row in enumerate(rows):
    out[index, : len(row)] = row
  return out


def make_branches(
  trunks: Sequence[Sequence[int]], branches: Sequence[Sequence[Sequence[int]]], prompt: int, response: int
) -> Branches:
  """Token lists as a `Branches` batch of the given prompt and response widths.

  make_branches([[7, 8]], [[[4], [4, 5]]], 3, 2) has trunk [[0, 7, 8]] and branches [[[4, 0], [4, 5]]].
  """
  k = len(branches[0])
  if any(len(row) != k for row in branches):
    raise ValueError(f"every prompt of a batch has the same number of responses, but here {set(map(len, branches))}")
  flat = [tokens for row in branches for tokens in row]
  return Branches(
    trunk=pad_left(trunks, prompt),
    branches=pad_right(flat, response).reshape(len(branches), k, response),
    trunk_length=np.asarray([len(row) for row in trunks], np.int32),
    branch_length=np.asarray([len(row) for row in flat], np.int32).reshape(-1, k),
  )


def prompts_only(trunks: Sequence[Sequence[int]], prompt: int) -> Branches:
  """A batch of trunks without branches: what sampling starts from."""
  rows = len(trunks)
  return Branches(
    trunk=pad_left(trunks, prompt),
    branches=np.zeros((rows, 0, 0), np.int32),
    trunk_length=np.asarray([len(row) for row in trunks], np.int32),
    branch_length=np.zeros((rows, 0), np.int32),
  )

"""Which responses of a prompt make a candidate pair: pure functions of texts, finishes and scores."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tsalign_jax.types import Finish

IDENTICAL = "all responses identical"
TRUNCATED = "fewer than two finished responses"
SMALL_MARGIN = "student sees no difference"


class Candidate(NamedTuple):
  """Two responses by index, the student's favourite first, and its score difference."""

  first: int
  second: int
  margin: float


def usable(texts: Sequence[str], finishes: Sequence[str], *, drop_truncated: bool) -> list[int] | str:
  """Indices of the responses that may be paired, each text once; or why there are fewer than two."""
  kept = [k for k, finish in enumerate(finishes) if finish == Finish.STOP or not drop_truncated]
  if len(kept) < 2:
    return TRUNCATED
  distinct = list({texts[k]: k for k in reversed(kept)}.values())
  return sorted(distinct) if len(distinct) > 1 else IDENTICAL


def best_worst(indices: Sequence[int], scores: Sequence[float], *, min_margin: float) -> Candidate | str:
  """The best and the worst response by score (TS-Align, section 3.2); ties go to the earlier response."""
  best = max(indices, key=lambda k: (scores[k], -k))
  worst = min(indices, key=lambda k: (scores[k], k))
  margin = scores[best] - scores[worst]
  return Candidate(best, worst, margin) if margin > 0 and margin >= min_margin else SMALL_MARGIN


def random_pairs(indices: Sequence[int], count: int, seed: Sequence[int]) -> list[tuple[int, int]]:
  """Up to `count` different pairs, each in random order, drawn from a generator with this seed."""
  random = np.random.default_rng(list(seed))
  pairs = [(a, b) for position, a in enumerate(indices) for b in indices[position + 1 :]]
  chosen = random.permutation(len(pairs))[:count]
  swaps = random.random(len(chosen)) < 0.5
  return [pairs[index][::-1] if swap else pairs[index] for index, swap in zip(chosen, swaps, strict=True)]

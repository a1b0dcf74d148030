"""A fair sample of held-out comparisons to read: which ones is settled by their ids, never by what they say."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from tsalign_jax.report.load import Comparison
from tsalign_jax.types import Verdict


def fair_sample(comparisons: Sequence[Comparison], size: int) -> list[Comparison]:
  """`size` comparisons (or all, if fewer) with each verdict in proportion, the same ones every time.

  Both who is taken and the order follow a hash of prompt id and response id, so that the order of the file
  does not matter and verdicts come mixed.
  """
  seats = apportion(Counter(item.verdict for item in comparisons), size)
  taken: Counter[Verdict] = Counter()
  sample = []
  for item in sorted(comparisons, key=_lot):
    if taken[item.verdict] < seats[item.verdict]:
      taken[item.verdict] += 1
      sample.append(item)
  return sample


def apportion(counts: Mapping[Verdict, int], seats: int) -> dict[Verdict, int]:
  """Seats in proportion to counts by largest remainder; 61, 12 and 27 share 10 seats as 6, 1 and 3."""
  total = sum(counts.values())
  seats = min(seats, total)
  shares = {key: divmod(count * seats, total) for key, count in counts.items()}
  given = {key: whole for key, (whole, _) in shares.items()}
  by_remainder = sorted(shares, key=lambda key: (-shares[key][1], str(key)))
  for key in by_remainder[: seats - sum(given.values())]:
    given[key] += 1
  return given


def _lot(item: Comparison) -> bytes:
  return hashlib.sha256(f"{item.prompt_id}/{item.response_id}".encode()).digest()

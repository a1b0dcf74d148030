"""Win rates and agreement with their uncertainty: pure numpy."""

from collections.abc import Sequence

import numpy as np

from tsalign_jax.types import Verdict

POINTS = {Verdict.FIRST: 1.0, Verdict.TIE: 0.5, Verdict.SECOND: 0.0}


def sign(margin: float) -> Verdict:
  """The verdict that a score difference (first minus second) stands for; a TIE only where the scores are equal."""
  return Verdict.FIRST if margin > 0 else Verdict.SECOND if margin < 0 else Verdict.TIE


def win_rate(verdicts: Sequence[Sequence[Verdict]]) -> float:
  """Wins plus half of the ties, over all decided comparisons; one inner list a prompt. NaN without any."""
  points = [POINTS[verdict] for row in verdicts for verdict in row if verdict in POINTS]
  return float(np.mean(points)) if points else float("nan")


def bootstrap_interval(
  verdicts: Sequence[Sequence[Verdict]], *, resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
  """Percentile interval of the win rate, resampling prompts: answers to one prompt are not independent."""
  rows = [[POINTS[verdict] for verdict in row if verdict in POINTS] for row in verdicts]
  rows = [row for row in rows if row]
  if not rows:
    return float("nan"), float("nan")
  points = np.asarray([sum(row) for row in rows])
  counts = np.asarray([len(row) for row in rows])
  drawn = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
  rates = points[drawn].sum(1) / counts[drawn].sum(1)
  tail = 100 * (1 - confidence) / 2
  low, high = np.percentile(rates, [tail, 100 - tail])
  return float(low), float(high)


def accuracy(margins: Sequence[float], verdicts: Sequence[Verdict]) -> float:
  """Share of the pairs the teacher decided that the student orders alike; a student's tie counts half."""
  agreed = []
  for margin, verdict in zip(margins, verdicts, strict=True):
    if verdict in (Verdict.FIRST, Verdict.SECOND):
      sign = 1 if verdict is Verdict.FIRST else -1
      agreed.append(0.5 + 0.5 * np.sign(margin) * sign)
  return float(np.mean(agreed)) if agreed else float("nan")

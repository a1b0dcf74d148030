"""Win rates, agreement and calibration: pure numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

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
  """Percentile interval of the win rate, resampling prompts: answers to one prompt are not independent.

  Where all n prompts are alike, so that resamples are too, it allows for other prompts that are too rare to have shown:
  a share of 1 - 0.025^(1/n) of them (Clopper and Pearson 1934), with any outcome.
  """
  rows = [[POINTS[verdict] for verdict in row if verdict in POINTS] for row in verdicts]
  return _mean_interval(rows, resamples=resamples, seed=seed, confidence=confidence)


def _mean_interval(
  rows: Sequence[Sequence[float]], *, resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
  rows = [row for row in rows if row]
  if not rows:
    return float("nan"), float("nan")
  points = np.asarray([sum(row) for row in rows])
  counts = np.asarray([len(row) for row in rows])
  tail = (1 - confidence) / 2
  if np.ptp(points / counts) == 0:
    rate, unseen = points[0] / counts[0], 1 - tail ** (1 / len(rows))
    return float(rate * (1 - unseen)), float(rate + (1 - rate) * unseen)
  drawn = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
  rates = points[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.quantile(rates, [tail, 1 - tail])
  return float(low), float(high)


class Accuracy(NamedTuple):
  """How often a student orders pairs as the teacher does: a share, its 95% interval over prompts, and of how many."""

  share: float
  interval: tuple[float, float]
  pairs: int


def accuracy(judged: Sequence[Sequence[tuple[float, Verdict]]], *, resamples: int, seed: int) -> Accuracy:
  """Of the pairs that the teacher decided; one inner list of (student's margin, teacher's verdict) a prompt."""
  rows = [[_agrees(*each) for each in row if each[1] in _SIDES] for row in judged]
  points = [each for row in rows for each in row]
  share = float(np.mean(points)) if points else float("nan")
  return Accuracy(share, _mean_interval(rows, resamples=resamples, seed=seed), len(points))


_SIDES = {Verdict.FIRST: 1, Verdict.SECOND: -1}


def _agrees(margin: float, verdict: Verdict) -> float:
  """1 where a student with this margin orders a pair as the teacher does, 0 where it does not, 0.5 for its ties."""
  return 0.5 + 0.5 * float(np.sign(margin)) * _SIDES[verdict]


class Bin(NamedTuple):
  """Pairs of which a student was about equally sure: how sure, how often it was right, and how many they are."""

  confidence: float
  accuracy: float
  pairs: int


class Calibration(NamedTuple):
  """How far a student's certainty is from how often it is right, on average over the pairs, and bin by bin."""

  error: float
  bins: list[Bin]


def calibration(margins: Sequence[float], verdicts: Sequence[Verdict], *, bins: int = 5) -> Calibration:
  """Expected calibration error (Guo et al. 2017, eq. 3) of the student's order, on the pairs the teacher decided.

  The student is sure of its order with probability sigmoid(|margin|), between 0.5 and 1; the bins divide this range
  evenly, and empty ones are left out. It is right where the teacher's order is the same; its ties count half.
  """
  decided = [(m, v) for m, v in zip(margins, verdicts, strict=True) if v in _SIDES]
  if not decided:
    return Calibration(float("nan"), [])
  sure = 1 / (1 + np.exp(-np.abs(np.asarray([margin for margin, _ in decided], float))))
  right = np.asarray([_agrees(*each) for each in decided])
  place = np.minimum((2 * bins * (sure - 0.5)).astype(int), bins - 1)
  groups = [place == index for index in range(bins) if (place == index).any()]
  found = [Bin(float(sure[group].mean()), float(right[group].mean()), int(group.sum())) for group in groups]
  error = sum(each.pairs * abs(each.accuracy - each.confidence) for each in found) / len(decided)
  return Calibration(error, found)


class Regret(NamedTuple):
  """By how much, in the teacher's score, a prompt's best response is better than the student's pick, and any."""

  pick: float
  random: float
  prompts: int


def regret(picks: Sequence[int], scores: Sequence[Float[np.ndarray, " k"]]) -> Regret:
  """The mean regret over prompts; `picks` index the student's favourite among the responses that have these scores."""
  best = np.asarray([np.max(each) for each in scores])
  picked = np.asarray([each[pick] for pick, each in zip(picks, scores, strict=True)])
  anything = np.asarray([np.mean(each) for each in scores])
  return Regret(float(np.mean(best - picked)), float(np.mean(best - anything)), len(scores))

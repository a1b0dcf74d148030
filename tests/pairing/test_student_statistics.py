"""Calibration and regret against sums written out."""

import math

import numpy as np
import pytest

from tsalign_jax.pairing.statistics import calibration, regret, sign
from tsalign_jax.types import Verdict

FIRST, SECOND, TIE, INCONSISTENT, ERROR = Verdict


def margin(sure: float) -> float:
  """The score difference of a student that is so sure."""
  return math.log(sure / (1 - sure))


def test_calibration_error_by_hand():
  """Two bins: 0.55 sure and right one time in four; 0.95 sure, and right three times in four."""
  margins = [margin(0.55), -margin(0.55), margin(0.55), -margin(0.55)] + [margin(0.95), -margin(0.95)] * 2
  verdicts = [SECOND, FIRST, SECOND, SECOND, FIRST, SECOND, SECOND, SECOND]
  found = calibration([*margins, 3.0, 3.0, 3.0], [*verdicts, TIE, INCONSISTENT, ERROR])
  assert [(round(each.confidence, 6), each.accuracy, each.pairs) for each in found.bins] == [
    (0.55, 0.25, 4),
    (0.95, 0.75, 4),
  ]
  assert found.error == pytest.approx((0.3 + 0.2) / 2)


def test_a_student_whose_probabilities_are_true_has_a_small_error_and_one_that_boasts_a_large_one():
  random = np.random.default_rng(0)
  margins = random.normal(0, 2, 20000)
  verdicts = [FIRST if draw else SECOND for draw in random.random(20000) < 1 / (1 + np.exp(-margins))]
  honest, boasting = calibration(margins, verdicts), calibration(5 * margins, verdicts)
  assert honest.error < 0.02 < 0.1 < boasting.error
  assert sum(each.pairs for each in honest.bins) == 20000 and len(honest.bins) == 5


def test_calibration_does_not_depend_on_which_response_comes_first():
  margins, verdicts = [0.3, -1.2, 2.0, 0.0], [FIRST, FIRST, SECOND, SECOND]
  swapped = calibration([-each for each in margins], [SECOND if v is FIRST else FIRST for v in verdicts])
  assert calibration(margins, verdicts) == swapped
  assert swapped.bins[0].accuracy == 0.75  # of 0.3, right, and of the tie, which counts half


def test_without_a_decided_pair_there_is_no_calibration():
  found = calibration([1.0], [TIE])
  assert math.isnan(found.error) and found.bins == []


def test_an_extreme_margin_is_a_certainty():
  assert calibration([1e4, -1e4], [FIRST, FIRST]).bins == [(1.0, 0.5, 2)]


def test_regret_is_what_the_pick_lacks_to_the_best():
  found = regret([1, 0], [np.asarray([1.0, 3.0, 2.0]), np.asarray([-2.0, -1.0])])
  assert found == (pytest.approx((0 + 1) / 2), pytest.approx((1 + 0.5) / 2), 2)


def test_only_equal_scores_tie():
  assert [sign(each) for each in (1e-30, -1e-30, 0.0)] == [FIRST, SECOND, TIE]

"""Mining and the statistics of a comparison."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsalign_jax.pairing.mine import IDENTICAL, SMALL_MARGIN, TRUNCATED, Candidate, best_worst, random_pairs, usable
from tsalign_jax.pairing.statistics import accuracy, bootstrap_interval, win_rate
from tsalign_jax.types import Verdict

WIN, LOSS, TIE, ERROR = Verdict.FIRST, Verdict.SECOND, Verdict.TIE, Verdict.ERROR


def test_best_and_worst_by_score():
  assert best_worst([0, 1, 2, 3], [0.5, -1.0, 2.0, 0.0], min_margin=0.0) == Candidate(2, 1, 3.0)


def test_equal_scores_make_no_candidate():
  assert best_worst([0, 1], [1.0, 1.0], min_margin=0.0) == SMALL_MARGIN
  assert best_worst([0, 1], [1.0, 0.9], min_margin=0.5) == SMALL_MARGIN


def test_duplicates_and_truncated_responses_are_not_paired():
  assert usable(["a", "b", "a"], ["stop"] * 3, drop_truncated=False) == [0, 1]
  assert usable(["a", "a"], ["stop"] * 2, drop_truncated=False) == IDENTICAL
  assert usable(["a", "b", "c"], ["stop", "length", "stop"], drop_truncated=True) == [0, 2]
  assert usable(["a", "b"], ["stop", "length"], drop_truncated=True) == TRUNCATED


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 1000))
def test_random_pairs_are_different_and_repeatable(n, count, seed):
  pairs = random_pairs(range(n), count, (seed, 1))
  assert pairs == random_pairs(range(n), count, (seed, 1))
  assert len({frozenset(pair) for pair in pairs}) == len(pairs) == min(count, n * (n - 1) // 2)


def test_win_rate_counts_ties_half_and_leaves_errors_out():
  assert win_rate([[WIN, TIE], [LOSS, ERROR]]) == 0.5
  assert np.isnan(win_rate([[ERROR]]))


def test_interval_resamples_prompts_and_not_answers():
  """Twin answers to each prompt carry no more information than one."""
  once = [[WIN if index % 3 else LOSS] for index in range(60)]
  twice = [row * 2 for row in once]
  assert bootstrap_interval(once, resamples=500, seed=0) == bootstrap_interval(twice, resamples=500, seed=0)


def test_interval_covers_the_truth_about_as_often_as_it_says():
  random, covered = np.random.default_rng(0), 0
  for seed in range(200):
    rows = [[WIN if random.random() < 0.6 else LOSS] for _ in range(100)]
    low, high = bootstrap_interval(rows, resamples=400, seed=seed)
    covered += low <= 0.6 <= high
  assert 0.90 <= covered / 200 <= 0.99


def test_accuracy_is_over_decided_pairs_and_a_students_tie_is_half():
  judged = [[(1.0, WIN), (-1.0, WIN)], [(0.0, LOSS), (5.0, TIE)], [(2.0, ERROR)]]
  found = accuracy(judged, resamples=200, seed=0)
  assert found.share == 0.5 and found.pairs == 3 and found.interval[0] <= 0.5 <= found.interval[1]


def test_interval_of_an_accuracy_resamples_prompts():
  random = np.random.default_rng(0)
  alone = [[(float(margin), WIN)] for margin in random.normal(0.3, 1, 100)]
  of_prompts = [5 * row for row in alone]  # says nothing more
  found = [accuracy(judged, resamples=500, seed=0).interval for judged in (alone, of_prompts)]
  assert found[0] == found[1] and 0.1 < found[0][1] - found[0][0] < 0.3


@pytest.mark.parametrize("prompts", [1, 3, 6, 128])
def test_interval_allows_for_what_too_few_prompts_cannot_show(prompts):
  """Where all prompts are won, the lower end is the chance of a win with which that happens once in forty times."""
  low, high = bootstrap_interval([[WIN, WIN]] * prompts, resamples=400, seed=0)
  assert high == 1.0 and low**prompts == pytest.approx(0.025)
  assert bootstrap_interval([[LOSS, LOSS]] * prompts, resamples=400, seed=0) == pytest.approx((0.0, 1 - low))
  assert bootstrap_interval([[TIE]] * prompts, resamples=400, seed=0) == pytest.approx((low / 2, 1 - low / 2))

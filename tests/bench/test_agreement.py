"""What the benchmarks compute from their runs, and that they refuse to compare different work."""

from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.contest import making_up
from benchmarks.dpo import alike_together, same_step
from benchmarks.growth import Point, draw, extra
from benchmarks.hugging_face import useful_lengths
from benchmarks.scoring import same_scores
from tsalign_jax.report.svg import to_string
from tsalign_jax.types import UserError

STEP = {"tokens": 10, "loss": 0.693, "logps/chosen": -50.0, "logps/rejected": -60.0, "grad_norm": 9.0}


def test_an_extra_unit_costs_one_first_in_proportion_and_nothing_if_free():
  points = [Point(8, 2.0, 1), Point(16, 4.0, 1), Point(32, 2.0, 1)]
  assert extra(points, points[1]) == 1
  assert extra(points, points[2]) == 0


def test_the_drawing_has_a_panel_for_each_sweep():
  curves = {name: [Point(1, 1.0, 1), Point(2, 1.5, 1)] for name in ("responses", "prompt_tokens", "prompts")}
  svg = ElementTree.fromstring(to_string(draw(curves)))
  assert len(svg.findall("{*}polyline")) == 3


def test_a_response_counts_up_to_its_first_end_token():
  tokens = np.asarray([[5, 2, 2, 2], [5, 6, 7, 8], [5, 6, 7, 2]])
  assert useful_lengths(tokens, [2]) == [2, 4, 4]
  assert useful_lengths(tokens, []) == [4, 4, 4]


def test_scores_that_differ_by_rounding_are_the_same_and_others_are_not():
  scores = np.linspace(-1, 1, 12).reshape(3, 4)
  same_scores({"tokens": 9, "scores": scores}, {"tokens": 9, "scores": scores + 1e-3 * np.sin(scores)})
  with pytest.raises(UserError, match="correlate"):
    same_scores({"tokens": 9, "scores": scores}, {"tokens": 9, "scores": scores[::-1]})
  with pytest.raises(UserError, match="9 and 10 tokens"):
    same_scores({"tokens": 9, "scores": scores}, {"tokens": 10, "scores": scores})


@pytest.mark.parametrize("name", STEP)
def test_a_first_step_that_differs_is_refused(name):
  assert "tokens 10 | 10" in same_step(STEP, STEP)
  with pytest.raises(UserError, match=name):
    same_step(STEP, STEP | {name: STEP[name] * 1.5})


def test_pairs_of_like_length_stand_together_and_steps_keep_theirs():
  lengths = [3, 9, 5, 1, 7, 2, 8]
  rows = [{"prompt_tokens": [0] * n, "chosen_tokens": [1], "rejected_tokens": [1, 2]} for n in lengths]
  sorted_rows = alike_together(rows, 4)
  assert [len(row["prompt_tokens"]) for row in sorted_rows] == [9, 5, 3, 1, 8, 7, 2]


def test_a_peer_takes_part_with_batches_that_make_up_our_steps():
  candidates = [{"batch": 4}, {"batch": 16}]
  assert making_up(32, candidates) == making_up(8, candidates) == candidates  # 16 at once of 8 are these 8
  assert making_up(24, candidates) == [{"batch": 4}]
  with pytest.raises(UserError, match=r"^--batch-size: 23 is a multiple of none"):
    making_up(23, candidates)

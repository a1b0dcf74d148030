"""Verdicts to pairs: what counts as the teacher reversing the student."""

import pytest
from stages import judging
from teachers.asked import pairs

from tsalign_jax.config import load_config
from tsalign_jax.data.files import read_preferences
from tsalign_jax.data.tables import CANDIDATES, VERDICTS, read_table, write_table
from tsalign_jax.stages.pair import pair
from tsalign_jax.types import Verdict

# The student's margin for the first response, the teacher's verdict, and whether the student was reversed.
CASES = [
  (0.5, Verdict.FIRST, False),
  (0.5, Verdict.SECOND, True),
  (-0.5, Verdict.FIRST, True),  # pairs in random order: the student may prefer the second
  (-0.5, Verdict.SECOND, False),
  (0.0, Verdict.FIRST, None),
  (None, Verdict.SECOND, None),
  (-0.5, Verdict.TIE, None),
  (0.5, Verdict.INCONSISTENT, None),
  (0.5, Verdict.ERROR, None),
]
DECIDED = (Verdict.FIRST, Verdict.SECOND)


@pytest.mark.parametrize("cases", [CASES, CASES[5:6]], ids=["all", "no student"])
def test_flip_is_a_verdict_against_the_students_order(cases, tmp_path):
  asked = pairs(len(cases))
  judging.write_inputs(tmp_path, asked)
  rows = [{"prompt_id": each.prompt.id, "first": 0, "second": 1} for each in asked]
  candidates = [row | {"margin": margin, "dropped": None} for row, (margin, *_) in zip(rows, cases, strict=True)]
  write_table(tmp_path / "candidates.parquet", candidates, CANDIDATES)
  given = {"probability": None, "evidence": "{}"}
  verdicts = [row | given | {"verdict": verdict} for row, (_, verdict, _) in zip(rows, cases, strict=True)]
  write_table(tmp_path / "verdicts.parquet", verdicts, VERDICTS)

  teacher = {"kind": "checks"}
  counts = pair(judging.job("pair", load_config(judging.config_file(tmp_path, teacher)), tmp_path))
  decided = [(each, flipped) for each, (_, verdict, flipped) in zip(asked, cases, strict=True) if verdict in DECIDED]
  rows = read_table(tmp_path / "pairs.parquet")
  assert [(row["prompt_id"], row["flipped"]) for row in rows] == [
    (each.prompt.id, flipped) for each, flipped in decided
  ]
  assert counts["flip_rate"] == (0.5 if len(cases) > 1 else None) and counts["pairs"] == len(decided)
  assert sum(counts["dropped"].values()) == len(cases) - len(decided)
  # Whoever reads this file as preferences finds no failure and no tie among them.
  assert len(read_preferences(str(tmp_path / "pairs.parquet"))) == len(decided)

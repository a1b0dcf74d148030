"""What each stage of TS-Align reads: which policy, which student, which pairs. No stage runs here."""

from pathlib import Path

import pytest

from tsalign_jax.config import Config
from tsalign_jax.recipes.step import Step
from tsalign_jax.recipes.ts_align import ts_align

RUN, POLICY, STUDENT = Path("runs/mine"), Path("models/policy"), Path("models/student")


def steps_of(**changes) -> dict[str, Step]:
  content = {
    "run": RUN,
    "policy": {"path": POLICY},
    "student": {"path": STUDENT, "warm_start": {}},
    "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
  }
  steps = list(ts_align(Config.model_validate(content | changes)))
  assert len({step.name for step in steps}) == len(steps)
  return {step.name: step for step in steps}


def test_each_round_goes_on_with_the_models_of_the_last():
  steps = steps_of()
  for name in ("sample", "align"):
    assert steps[f"round_01/{name}"].reads["policy"] == POLICY
    assert steps[f"round_02/{name}"].reads["policy"] == RUN / "round_01" / "policy"
  for name in ("score", "distil"):
    assert steps[f"round_01/{name}"].reads["student"] == RUN / "round_00" / "student"
    assert steps[f"round_02/{name}"].reads["student"] == RUN / "round_01" / "student"
  assert steps["round_00/distil"].reads["student"] == STUDENT
  assert steps["round_00/answer"].reads["policy"] == POLICY
  for number in (1, 2):
    folder = RUN / f"round_{number:02d}"
    reads = steps[f"{folder.name}/evaluate"].reads
    assert steps[f"{folder.name}/answer"].reads["policy"] == folder / "policy"
    assert (reads["base_answers"], reads["policy_answers"]) == (
      RUN / "round_00" / "answers.parquet",
      folder / "answers.parquet",
    )
    assert (reads["student_initial"], reads["student_now"]) == (RUN / "round_00" / "student", folder / "student")
    assert reads["policy_initial"] == POLICY


@pytest.mark.parametrize(("choice", "second"), [("previous", RUN / "round_01" / "policy"), ("initial", POLICY)])
def test_the_reference_is_the_policy_before_the_round_or_before_the_run(choice, second):
  steps = steps_of(align={"reference": choice})
  assert steps["round_01/align"].reads["reference"] == POLICY
  assert steps["round_02/align"].reads["reference"] == second


def test_a_round_learns_from_its_own_pairs_and_replays_all_earlier_ones():
  steps = steps_of(rounds=3)
  for number in range(4):
    folder, distil = RUN / f"round_{number:02d}", steps[f"round_{number:02d}/distil"]
    replayed = {path for role, path in distil.reads.items() if role.startswith("replay_")}
    assert distil.reads["pairs"] == folder / "pairs.parquet"
    assert replayed == {RUN / f"round_{earlier:02d}" / "pairs.parquet" for earlier in range(number)}
    if number:
      assert steps[f"{folder.name}/align"].reads["pairs"] == folder / "pairs.parquet"
  without = steps_of(student={"path": STUDENT})["round_02/distil"].reads
  assert [path for role, path in without.items() if role.startswith("replay_")] == [RUN / "round_01" / "pairs.parquet"]


def test_a_student_that_does_not_learn_stays():
  steps = steps_of(student={"path": STUDENT}, distil=None)
  assert not [name for name in steps if name.endswith("/distil") or name == "round_00/sample"]
  for number in (1, 2):
    assert steps[f"round_{number:02d}/score"].reads["student"] == STUDENT
    reads = steps[f"round_{number:02d}/evaluate"].reads
    assert reads["student_initial"] == reads["student_now"] == STUDENT


def test_prompts_are_taken_one_round_after_the_other_behind_those_of_the_warm_start():
  prompts = {"train": "train.jsonl", "heldout": "heldout.jsonl", "per_round": 10}
  steps = steps_of(student={"path": STUDENT, "warm_start": {"prompts": 7}}, prompts=prompts)
  chosen = [
    tuple(steps[f"round_{number:02d}/sample"].options[key] for key in ("reserved", "start", "count"))
    for number in range(3)
  ]
  assert chosen == [(0, 0, 7), (7, 0, 10), (7, 10, 10)]

"""Which pairs the student learns from a second time."""

import json

import pytest

from tsalign_jax.data.tables import PROMPTS, write_table
from tsalign_jax.stages.distil import _replayed, human_pairs


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.5, 6), (0.75, 18)])
def test_replayed_pairs_make_up_their_share_and_come_once_before_any_comes_twice(share, count):
  seen, new = 5, 6
  replayed = _replayed(seen, new, share, seed=0)
  assert len(replayed) == count
  for start in range(0, count, seen):
    once = replayed[start : start + seen]
    assert len(set(once)) == len(once) and set(once) <= {*range(seen)}
  assert replayed == _replayed(seen, new, share, seed=0)
  assert _replayed(0, new, share, seed=0) == []


def test_which_pairs_are_replayed_first_depends_on_the_seed():
  assert len({tuple(_replayed(5, 5, 0.5, seed)) for seed in range(10)}) > 5


def test_human_pairs_of_measured_prompts_are_left_out_and_counted(tmp_path):
  turns = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
  rows = [{"prompt": turn, "chosen": "yes", "rejected": "no"} for turn in turns]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  measured = [{"prompt_id": 0, "prompt": turns[1], "checks": "[]", "tokens": [1], "dropped": None}]
  write_table(tmp_path / "heldout.parquet", measured, PROMPTS)
  kept, left_out = human_pairs(str(tmp_path / "pairs.jsonl"), tmp_path / "heldout.parquet")
  assert [pair.prompt for pair in kept] == [turns[0], turns[2]] and left_out == 1

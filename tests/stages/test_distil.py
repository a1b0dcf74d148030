"""Which pairs the student learns from a second time."""

import json

from tsalign_jax.data.tables import PROMPTS, write_table
from tsalign_jax.stages.distil import human_pairs


def test_human_pairs_of_measured_prompts_are_left_out_and_counted(tmp_path):
  turns = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
  rows = [{"prompt": turn, "chosen": "yes", "rejected": "no"} for turn in turns]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  measured = [{"prompt_id": 0, "prompt": turns[1], "checks": "[]", "tokens": [1], "dropped": None}]
  write_table(tmp_path / "heldout.parquet", measured, PROMPTS)
  kept, left_out = human_pairs(str(tmp_path / "pairs.jsonl"), tmp_path / "heldout.parquet")
  assert [pair.prompt for pair in kept] == [turns[0], turns[2]] and left_out == 1

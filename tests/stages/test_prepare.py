"""Which prompts of the files a run uses."""

import dataclasses
import json

import tiny
from stages import judging

from tsalign_jax.config import load_config
from tsalign_jax.data.tables import read_table
from tsalign_jax.stages.prepare import prepare


def test_as_many_heldout_prompts_as_asked_for_are_used_whatever_is_too_long(tmp_path):
  config = tiny.run_config(tmp_path)
  tiny.prompts(tmp_path / "heldout.jsonl", 12)
  rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
  for index in (2, 3, 5):
    rows[index]["prompt"] = "the cat " * 40
  (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  job = judging.job("prepare", load_config(config, ["prompts.heldout_limit=3"]), tmp_path)
  writes = {split: tmp_path / f"{split}.parquet" for split in ("train", "heldout")}
  counts = prepare(dataclasses.replace(job, writes=writes))
  table = read_table(writes["heldout"])
  assert [row["prompt_id"] for row in table if row["dropped"] is None] == [0, 6, 9]  # evenly from the nine that fit
  assert [row["prompt_id"] for row in table] == [*range(12)]
  # Nine of the held-out prompts are in the other file as well, where nobody may learn from them.
  assert counts == {
    "train_prompts": 15,
    "train_dropped": {"the prompt is held out": 9},
    "heldout_prompts": 3,
    "heldout_dropped": {"longer than 60 tokens": 3, "beyond prompts.heldout_limit": 6},
  }

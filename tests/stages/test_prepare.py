"""Which prompts of the files a run uses."""

import dataclasses
import json

import tiny
from stages import judging

from tsalign_jax.config import load_config
from tsalign_jax.data.tables import read_table
from tsalign_jax.stages.prepare import prepare


def prepared(config, folder):
  """What `prepare` counts, and the rows that it writes, by split."""
  writes = {split: folder / f"{split}.parquet" for split in ("train", "heldout")}
  counts = prepare(dataclasses.replace(judging.job("prepare", config, folder), writes=writes))
  return counts, {split: read_table(file) for split, file in writes.items()}


def test_a_prompt_that_is_there_twice_is_used_once(tmp_path):
  """Answers to one prompt are no independent evidence, and one that was used is not used again."""
  config = load_config(tiny.run_config(tmp_path))
  for split, twice in (("train", [0, 3, 3]), ("heldout", [1])):
    file = tmp_path / f"{split}.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, *(lines[index] for index in twice), ""]))
  other_checks = json.loads(lines[1]) | {"checks": [{"name": "max_words", "limit": 3}]}
  with file.open("a") as end:
    end.write(json.dumps(other_checks) + "\n")
  counts, rows = prepared(config, tmp_path)
  assert (counts["train_prompts"], counts["heldout_prompts"]) == (24, 9)
  assert counts["train_dropped"] == {"the prompt is there already": 3}
  assert counts["heldout_dropped"] == {"the prompt is there already": 1}
  assert [row["prompt_id"] for row in rows["heldout"] if row["dropped"]] == [8]


def test_as_many_heldout_prompts_as_asked_for_are_used_whatever_is_too_long(tmp_path):
  config = tiny.run_config(tmp_path)
  tiny.prompts(tmp_path / "heldout.jsonl", 12)
  rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
  for index in (2, 3, 5):
    rows[index]["prompt"] = "the cat " * 40
  (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  counts, rows = prepared(load_config(config, ["prompts.heldout_limit=3"]), tmp_path)
  table = rows["heldout"]
  assert [row["prompt_id"] for row in table if row["dropped"] is None] == [0, 6, 9]  # evenly from the nine that fit
  assert [row["prompt_id"] for row in table] == [*range(12)]
  # Nine of the held-out prompts are in the other file as well, where nobody may learn from them.
  assert counts == {
    "train_prompts": 15,
    "train_dropped": {"the prompt is held out": 9},
    "heldout_prompts": 3,
    "heldout_dropped": {"longer than 60 tokens": 3, "beyond prompts.heldout_limit": 6},
  }

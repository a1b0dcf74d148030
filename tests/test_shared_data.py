"""The loop on real prompts and human preferences, where a checkout of them lies beside the project."""

import json
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from tsalign_jax.config import RewardConfig, load_config
from tsalign_jax.loop import run
from tsalign_jax.progress import terminal_progress
from tsalign_jax.train_reward import train_reward

DATA = Path(__file__).parents[1].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no folder shared/data beside the project")


def test_a_reward_model_trains_on_human_preferences_and_names_what_it_drops(tmp_path):
  tiny.encoder("bert", tmp_path / "model")
  tiny.bert_tokenizer(tmp_path / "model")
  for name, count in (("train", 60), ("test", 20)):
    rows = (DATA / "hh_rlhf" / f"preferences.{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.jsonl").write_text("".join(rows[:count]))
  config = RewardConfig(
    run=tmp_path / "run",
    model={"path": tmp_path / "model", "dtype": "float32", "max_tokens": 100},
    pairs={"train": [str(tmp_path / "train.jsonl")], "heldout": str(tmp_path / "test.jsonl")},
    training={"batch_size": 8, "microbatch_tokens": 2048},
  )
  train_reward(config, terminal_progress(Console(quiet=True)))
  metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
  assert metrics["dropped"].keys() == {"longer than 100 tokens"} and 0 < metrics["heldout_cut"] < 20
  assert metrics["train_pairs"] + metrics["dropped"]["longer than 100 tokens"] == 60
  assert metrics["heldout_pairs"] == 20 and 0 <= metrics["accuracy"] <= 1


def test_the_loop_runs_on_real_prompts_and_replays_human_preferences(tmp_path):
  file = tiny.run_config(
    tmp_path,
    rounds=1,
    mesh={"fsdp": 4, "tensor": 2},
    prompts={
      "train": str(DATA / "prompts" / "train.jsonl"),
      "heldout": str(DATA / "prompts" / "eval.jsonl"),
      "max_tokens": 100,
      "per_round": 8,
      "heldout_limit": 8,
    },
    teacher={"kind": "checks", "default": [{"name": "max_words", "limit": 6}, {"name": "no_commas"}]},
    align={"batch_size": 4, "microbatch_tokens": 512},
    distil={"batch_size": 4, "microbatch_tokens": 512, "replay": str(DATA / "hh_rlhf" / "preferences.train.jsonl")},
  )
  run(load_config(file), terminal_progress(Console(quiet=True)))
  metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
  assert metrics["pairs"] > 0
  assert all(metrics["prompts_dropped"][split]["longer than 100 tokens"] > 0 for split in ("training", "held-out"))
  distilled = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["round_01/distil"]["counts"]
  assert distilled["replayed_pairs"] == distilled["new_pairs"]

"""What the experiment with human preferences makes of other people's files, and of its own runs."""

import gzip
import json

import pytest

from benchmarks import human
from tsalign_jax.config import Config, load_config
from tsalign_jax.data.files import read_preferences
from tsalign_jax.types import UserError


@pytest.fixture
def data(tmp_path, monkeypatch):
  """Thirty votes and one more on the last prompt, one of which nests its prompt; and six prompts with models' answers.

  The third of these begins a conversation that policies are evaluated on.
  """
  monkeypatch.setattr(human, "GOLD", tmp_path / "runs" / "gold")
  votes = [
    {
      "prompt": [{"role": "user", "content": f"question {min(n, 29)}"}],
      "chosen": human._said("yes"),
      "rejected": human._said("no"),
    }
    for n in range(31)
  ]
  votes[3]["prompt"] = [{"role": "user", "content": votes[3]["prompt"]}]
  for folder in ("tulu_human", "alpaca_eval"):
    (tmp_path / folder).mkdir()
  (tmp_path / "tulu_human" / "preferences.jsonl").write_text("\n".join(map(json.dumps, votes)))
  answers = {name: f"by {name}" for tier in human.TIERS for name in tier}
  with gzip.open(tmp_path / "alpaca_eval" / "answers_by_model.jsonl.gz", "wt") as file:
    file.write("\n".join(json.dumps({"prompt": f"task {n}", "answers": answers}) for n in range(6)))
  conversation = [{"role": "user", "content": "task 2 "}, *human._said("How so?"), {"role": "user", "content": "So."}]
  (tmp_path / "unseen.jsonl").write_text(json.dumps({"prompt": conversation}))
  return tmp_path


def test_the_gold_model_learns_from_votes_and_tiers_and_is_measured_on_other_prompts(data):
  train, heldout = (read_preferences(str(file)) for file in human._gold_preferences(data, data / "unseen.jsonl"))
  asked, held = ([pair.prompt[0]["content"] for pair in pairs] for pairs in (train, heldout))
  votes = {f"question {n}" for n in range(30)}
  assert 2 < len(set(held)) < 12 and set(held) <= votes
  assert sorted(asked + held).count("question 29") == 2  # both votes on it are on one side
  # Task 1 would be held out, were it a vote.
  assert set(asked) | set(held) == votes | {f"task {n}" for n in (0, 3, 4, 5)} and not set(asked) & set(held)
  for pair in train:
    if pair.prompt[0]["content"].startswith("task"):
      tier = human.TIERS[int(pair.prompt[0]["content"].split()[1]) % len(human.TIERS)]
      assert (pair.chosen, pair.rejected) == tuple(f"by {name}" for name in tier)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"preferences\.jsonl: there is no such file; --data"):
    human._gold_preferences(tmp_path, tmp_path / "unseen.jsonl")


@pytest.mark.parametrize("variant", human.variants(), ids=lambda variant: variant.name)
def test_every_variant_is_a_valid_configuration(variant):
  config = load_config(human.CONFIGS / "hh_human.yaml", ("distil.epochs=2", *variant.overrides), Config)
  whole = variant.name == "TS-Align"
  assert (config.student.path == config.teacher.path) == (variant.teacher_scores or variant.student_judges)
  assert (config.distil is not None) == whole == (not variant.idle)
  assert config.mining.strategy == ("random" if variant.name == "random pairs" else "best_worst")
  judges = config.evaluation.judges
  assert (judges["teacher"].path == human.TEACHER / "model") if variant.student_judges else not judges


def test_what_the_teacher_read_is_counted_where_it_stands(tmp_path):
  stages = {
    "round_00/answer": {"seconds": 900, "counts": {}},
    "round_01/sample": {"seconds": 60, "counts": {}},
    "round_01/score": {"seconds": 20, "counts": {"scored": 80}},
    "round_01/mine": {"seconds": 1, "counts": {}},
    "round_01/judge": {"seconds": 8, "counts": {"verdicts": {"first": 6, "second": 3, "tie": 1}}},
    "round_01/pair": {"seconds": 1, "counts": {}},
    "round_01/align": {"seconds": 30, "counts": {}},
    "round_01/answer": {"seconds": 500, "counts": {}},
    "round_01/evaluate": {"seconds": 500, "counts": {}},
  }
  opinion = {"win_rate": 0.25, "win_rate_ci": [0.2, 0.3]}
  metrics = {
    "win_rate": 0.5,
    "win_rate_ci": [0.4, 0.6],
    "judges": {"gold": opinion, "teacher": opinion | {"win_rate": 0.75}},
    "mean_length_base": 40.2,
    "mean_length_policy": 31.0,
  }
  (tmp_path / "round_01").mkdir()
  (tmp_path / "round_01" / "metrics.json").write_text(json.dumps(metrics))
  (tmp_path / "manifest.json").write_text(json.dumps({"stages": stages}))

  def row(**options) -> list[str]:
    *_, last = human.variant_table([human.Variant("it", tmp_path, (), **options)]).splitlines()
    return last.strip("| ").split(" | ")

  assert row() == [
    *("it", "1", "50.0% (40.0% to 60.0%)", "25.0% (20.0% to 30.0%)"),
    *("40 → 31", "20", "0.5 min", "2.0 min"),
  ]
  assert row(teacher_scores=True, idle=("judge",))[5:] == ["80", "0.4 min", "1.9 min"]
  assert row(idle=("score",))[5:] == ["20", "0.2 min", "1.7 min"]
  assert row(student_judges=True)[2] == "75.0% (20.0% to 30.0%)" and row(student_judges=True)[5] == "0"

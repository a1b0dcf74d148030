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
  """A folder with seven votes, one of which nests its prompt, and six prompts with answers of models."""
  monkeypatch.setattr(human, "GOLD", tmp_path / "runs" / "gold")
  votes = [
    {
      "prompt": [{"role": "user", "content": f"question {n}"}],
      "chosen": human._said("yes"),
      "rejected": human._said("no"),
    }
    for n in range(7)
  ]
  votes[3]["prompt"] = [{"role": "user", "content": votes[3]["prompt"]}]
  for folder in ("tulu_human", "alpaca_eval"):
    (tmp_path / folder).mkdir()
  (tmp_path / "tulu_human" / "preferences.jsonl").write_text("\n".join(map(json.dumps, votes)))
  answers = {name: f"by {name}" for tier in human.TIERS for name in tier}
  with gzip.open(tmp_path / "alpaca_eval" / "answers_by_model.jsonl.gz", "wt") as file:
    file.write("\n".join(json.dumps({"prompt": f"task {n}", "answers": answers}) for n in range(6)))
  return tmp_path


def test_the_gold_model_learns_from_votes_and_tiers_and_is_measured_on_other_votes(data):
  train, heldout = (read_preferences(str(file)) for file in human._gold_preferences(data))
  asked = [pair.prompt[0]["content"] for pair in train]
  assert asked == [f"question {n}" for n in (1, 2, 3, 4, 6)] + [f"task {n}" for n in range(6)]
  assert [pair.prompt[0]["content"] for pair in heldout] == ["question 0", "question 5"]
  assert [(pair.chosen, pair.rejected) for pair in train[5:8]] == [
    tuple(f"by {name}" for name in tier) for tier in human.TIERS
  ]


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"preferences\.jsonl: there is no such file; --data"):
    human._gold_preferences(tmp_path)


@pytest.mark.parametrize("variant", human.variants(), ids=lambda variant: variant.name)
def test_every_variant_is_a_valid_configuration(variant):
  config = load_config(human.CONFIGS / "hh_human.yaml", variant.overrides, Config)
  assert (config.student.path == config.teacher.path) == (variant.teacher_scores or variant.student_judges)


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
    *_, last = human.variant_table([human.Variant("it", tmp_path, **options)]).splitlines()
    return last.strip("| ").split(" | ")

  assert row() == [
    *("it", "1", "50.0% (40.0% to 60.0%)", "25.0% (20.0% to 30.0%)"),
    *("40 → 31", "20", "0.5 min", "2.0 min"),
  ]
  assert row(teacher_scores=True)[5] == "100"
  assert row(student_judges=True)[2] == "75.0% (20.0% to 30.0%)" and row(student_judges=True)[5] == "0"

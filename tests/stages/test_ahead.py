"""Judging while sampling: the same verdicts for the same money, most of them before the last prompt is complete."""

import json
import re
from concurrent.futures import wait

import pytest
import tiny
from chat_server import ChatServer, completion
from stages.judging import QUIET
from teachers.asked import KEY, endpoint

from tsalign_jax import loop
from tsalign_jax.config import load_config
from tsalign_jax.data.tables import read_table
from tsalign_jax.loop import run, run_steps
from tsalign_jax.manifest import Manifest
from tsalign_jax.recipes.ts_align import ts_align
from tsalign_jax.stages import ahead
from tsalign_jax.types import UserError

LABELLING = ("round_00/prepare", "round_01/sample", "round_01/score", "round_01/mine", "round_01/judge")


def longer(content: str) -> str:
  """A judge who likes words."""
  first, second = (len(re.search(rf"<response_{side}>(.*?)</response_{side}>", content, re.S)[1]) for side in "ab")
  return "A" if first > second else "B" if second > first else "C"


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch, one_device):
  monkeypatch.setattr(loop, "make_mesh", lambda **axes: one_device)


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", KEY)
  with ChatServer(longer) as listening:
    yield listening


def configured(folder, server, strategy="best_worst"):
  """A round that labels 20 prompts of a tiny policy with this server."""
  folder.mkdir()
  changes = {
    "rounds": 1,
    "distil": None,
    "student": {"path": str(folder / "student"), "dtype": "float32"},
    "teacher": {"kind": "llm_judge", "model": "judge-1", "endpoint": endpoint(server, concurrency=2)},
    "mining": {"strategy": strategy},
  }
  file = tiny.run_config(folder, **changes)
  return load_config(file, ["prompts.per_round=20"])


def label(config) -> Manifest:
  steps = [step for step in ts_align(config) if step.name in LABELLING]
  run_steps(config, steps, QUIET, lambda: None, lambda *_: None)
  return Manifest(config.run)


def verdicts(config):
  return read_table(config.run / "round_01" / "verdicts.parquet")


@pytest.fixture
def sampling_takes_long(monkeypatch):
  """So long that a few prompts are judged before the next ones are complete."""
  monkeypatch.setattr(ahead, "ENOUGH", 4)
  tell = ahead.Ahead.tell

  def tell_and_wait(self, rows):
    tell(self, rows)
    wait(self._asked)

  monkeypatch.setattr(ahead.Ahead, "tell", tell_and_wait)


@pytest.mark.parametrize("strategy", ["best_worst", "random"])
@pytest.mark.usefixtures("sampling_takes_long")
def test_judging_ahead_changes_nothing_and_pays_for_nothing_twice(strategy, server, tmp_path, monkeypatch):
  early = configured(tmp_path / "early", server, strategy)
  counts = {name: entry["counts"] for name, entry in label(early).stages.items()}
  asked = sorted(request.content for request in server.log)
  pairs = counts["round_01/mine"]["candidates"]
  assert len(asked) == len({*asked}) == 2 * pairs  # in both orders
  assert counts["round_01/judge"]["judging"]["pairs"] < pairs / 2
  assert counts["round_01/sample"]["judging"]["seconds"] > 0

  server.reset()
  late = configured(tmp_path / "late", server, strategy)
  monkeypatch.setattr(ahead.Ahead, "tell", lambda self, rows: None)
  counts = {name: entry["counts"] for name, entry in label(late).stages.items()}
  assert counts["round_01/judge"]["judging"]["pairs"] == pairs
  assert sorted(request.content for request in server.log) == asked
  assert verdicts(early) == verdicts(late)


@pytest.mark.usefixtures("sampling_takes_long")
def test_a_refusal_stops_sampling_and_what_was_sampled_is_kept(server, tmp_path):
  config = configured(tmp_path / "run", server)
  server.reset(["401"])
  with pytest.raises(UserError, match=r"teacher: .* refused a request"):
    label(config)
  kept = list((config.run / "round_01" / "sample.partial").glob("*.parquet"))
  assert kept and len(server.log) <= 2
  label(config)
  assert len(verdicts(config)) > 10


def test_a_teacher_without_a_network_is_not_asked_ahead(tmp_path):
  config = load_config(tiny.run_config(tmp_path))
  for step in ts_align(config):
    assert "mining" not in step.options and (step.stage_name != "sample" or "student" not in step.reads)


def test_the_key_is_in_no_file_of_a_whole_run(server, tmp_path):
  """Also where the server repeats it: in answers, in its model's name, and in the errors that come before them."""
  server.answer = lambda content: (
    completion(f"<think>I was called with {KEY}.</think>{longer(content)}") | {"model": KEY}
  )
  config = configured(tmp_path / "run", server)
  judge = {"kind": "llm_judge", "model": "judge-2", "endpoint": endpoint(server, concurrency=2)}
  config = load_config(tmp_path / "run" / "config.yaml", [f"evaluation.judges.other={json.dumps(judge)}"])
  server.reset(["401"])
  with pytest.raises(UserError) as refusal:
    run(config, QUIET)
  server.reset(["429", "500", "garbage"])
  run(config, QUIET)
  assert KEY not in str(refusal.value) and len(server.log) > 100
  assert {request.headers["authorization"] for request in server.log} == {f"Bearer {KEY}"}
  files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
  seen = {file.name for file in files}
  assert seen >= {"config.yaml", "manifest.json", "metrics.json", "report.html", "verdicts.sqlite", "ledger.sqlite"}
  assert seen >= {"responses.parquet", "verdicts.parquet", "comparisons.parquet", "align.jsonl"}
  assert not [file for file in files if KEY.encode() in file.read_bytes()]
  tables = {file.name: str(read_table(file)) for file in files if file.suffix == ".parquet"}  # which are compressed
  assert not [name for name, content in tables.items() if KEY in content]
  assert "I was called with" in tables["verdicts.parquet"]

"""The workers of the benchmarks: processes that answer in turn, sleep in between, and fail in one sentence."""

import argparse
import sys
import time
from pathlib import Path

import pytest

from benchmarks.contest import OURS, Side, contest, ratio
from benchmarks.workers import Worker, WorkerError
from tsalign_jax.types import UserError

COUNTING = "tests.bench.contenders:Counting"


def start(folder: Path, **changes) -> Worker:
  arguments = {"program": COUNTING, "work": {"a": 1}, "settings": {"b": 2}, "python": sys.executable, "hide": ()}
  return Worker(**(arguments | changes), log=folder / "log")


def state(worker: Worker) -> str:
  """T where the process is stopped."""
  return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_gets_its_work_and_answers_each_run(tmp_path):
  with start(tmp_path) as worker:
    ready = worker.ready()
    first, second = worker.run(1), worker.run(2)
  assert ready["check"]["work"] == {"a": 1} and ready["check"]["settings"] == {"b": 2}
  assert set(ready["versions"]) == {"pytest"}
  assert (first["seed"], second["seed"]) == (1, 2)
  assert first["seconds"] >= 0.01 and first["compiling"] == 0 and first["peak_gib"] > 0
  assert "a library that prints" in (tmp_path / "log").read_text()


def test_a_run_that_compiles_is_repeated_and_the_repetition_counts(tmp_path):
  with start(tmp_path, program="tests.bench.contenders:Compiling") as worker:
    worker.ready()
    first, same, other = worker.run(3), worker.run(3), worker.run(4)
  assert first["compiling"] > 0 and other["compiling"] > 0
  assert same["compiling"] == 0
  assert (first["units"], other["units"]) == (3, 4)


def test_a_hidden_module_is_as_good_as_not_installed(tmp_path):
  with start(tmp_path, hide=("torch",), settings={"look_for_torch": True}) as worker:
    assert worker.ready()["check"]["torch"] is False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_sleeps_while_it_is_not_its_turn(tmp_path):
  with start(tmp_path) as worker:
    worker.ready()
    for _ in range(500):
      if state(worker) == "T":
        break
      time.sleep(0.01)
    assert state(worker) == "T"
    worker.run(1)
  assert worker.process.poll() is not None


def test_a_worker_that_fails_says_why(tmp_path):
  with start(tmp_path, settings={"broken": True}) as worker, pytest.raises(WorkerError, match="no such batch size"):
    worker.ready()


def options(folder: Path, **changes) -> argparse.Namespace:
  return argparse.Namespace(**({"cache": folder, "runs": 2, "no_tuning": False} | changes))


def test_sides_take_turns_and_settings_that_fail_are_passed_over(tmp_path):
  sides = [
    Side(OURS, COUNTING, ({"b": 1},)),
    Side("peer", COUNTING, ({"broken": True}, {"b": 1}, {"b": 2})),
  ]
  results = contest(
    "Test", sides, {}, options(tmp_path), unit="units/s", agree=lambda *_: "", eligible=lambda each: each.get("b") != 2
  )
  assert [(run["seed"], run["runs"]) for run in results["peer"]] == [(1, 2), (2, 4)]  # the first of a turn wakes it up
  assert results.keys() == {OURS, "peer"}


def test_different_work_is_refused(tmp_path):
  sides = [Side(OURS, COUNTING, ({"responses": 1},)), Side("peer", COUNTING, ({"responses": 2},))]
  with pytest.raises(UserError, match=r"not do the same work: responses .*'tsalign_jax': \{1\}, 'peer': \{2\}"):
    contest("Test", sides, {}, options(tmp_path), unit="units/s")


def test_ratios_are_of_medians():
  runs = {
    OURS: [{"units": 4, "seconds": s} for s in (1, 2, 100)],
    "peer": [{"units": 1, "seconds": s} for s in (1, 2, 3)],
  }
  assert ratio(runs, "peer") == 4


def test_a_side_without_settings_that_run_is_named(tmp_path):
  sides = [Side(OURS, COUNTING, ({"broken": True}, {"broken": 1}))]
  with pytest.raises(UserError, match=r"tsalign_jax: none of its settings"):
    contest("Test", sides, {}, options(tmp_path), unit="units/s")

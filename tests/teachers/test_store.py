"""Stores that several runs share."""

import sqlite3
import threading

from tsalign_jax.teachers.store import Answer, Price, Score, ScoreStore, VerdictStore


def test_a_new_file_that_another_run_is_opening_is_waited_for(tmp_path):
  other = sqlite3.connect(tmp_path / "verdicts.sqlite", isolation_level=None, check_same_thread=False)
  other.execute("BEGIN IMMEDIATE")
  releasing = threading.Event()
  release = threading.Timer(0.3, lambda: releasing.set() or other.close())
  release.start()
  store = VerdictStore(tmp_path / "verdicts.sqlite")
  assert releasing.is_set() and store.get("?") is None
  store.close()
  release.join()


def test_of_two_runs_that_computed_the_same_score_the_first_is_believed(tmp_path):
  one, other = (ScoreStore(tmp_path / "verdicts.sqlite") for _ in range(2))
  assert one.get(["a"]) == other.get(["a"]) == {}
  first, second = Score(1.0, 2, False, 0.1), Score(1.0000001, 2, False, 0.1)
  assert one.put("teacher", {"a": first}) == {"a": first}
  assert other.put("teacher", {"a": second, "b": second}) == {"a": first, "b": second}
  assert one.total("teacher").responses == 2


def test_of_two_runs_that_asked_the_same_question_the_first_answer_is_believed(tmp_path):
  one, other = (VerdictStore(tmp_path / "verdicts.sqlite") for _ in range(2))
  first, second, price = Answer("A", None, "A"), Answer("B", None, "B"), Price(1, 1, 0.0)
  assert one.put("key", "judge", first, price, None, 0.0) == first
  assert other.put("key", "judge", second, price, None, 1.0) == other.get("key") == one.get("key") == first

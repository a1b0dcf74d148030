"""How the student's quality is measured: with students whose order of the answers is known."""

import types

import pytest

from tsalign_jax.config import Evaluation, Mining
from tsalign_jax.data.tables import PROMPTS, RESPONSES, SCORES, write_table
from tsalign_jax.pairing.statistics import sign
from tsalign_jax.stages import diagnose
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.types import Judgement

PROMPT_IDS = range(10, 22)
WORTH = {"initial": -1.0, "now": 2.0}  # what a student makes of an answer's number: the first one orders them backwards


class Counting(Teacher):
  """An answer is worth the number in it."""

  identity = "counting"

  def __init__(self):
    self.asked = []

  def judge(self, pairs):
    self.asked += pairs
    return [Judgement(sign(float(pair.first) - float(pair.second))) for pair in pairs]

  def scores(self, asked):
    return [[float(text) for text in texts] for _, texts in asked]


class Engine:
  """Scores by the factor that a student's parameters are here; an item is the prompt's answers."""

  model = None

  def encode(self, prompt, choices):
    return choices

  def score(self, params, items):
    return ((n, [params * float(text) for text in items[n]]) for n in reversed(range(len(items))))


@pytest.fixture
def job(tmp_path, monkeypatch):
  monkeypatch.setattr(diagnose, "build_reward_engine", lambda *_: Engine())
  prompts = {"prompt": [{"role": "user", "content": "?"}], "checks": "[]", "tokens": [1], "dropped": None}
  write_table(tmp_path / "prompts.parquet", [prompts | {"prompt_id": i} for i in PROMPT_IDS], PROMPTS)
  # Four responses a prompt, worth 0 to 3; the student that scored them likes the best of every third prompt's, and
  # elsewhere the worst, with the second worst behind it. The worst and the best do not come to an end.
  rows = [
    {"prompt_id": i, "response_id": k, "text": str(k), "finish": "length" if k in (0, 3) else "stop"}
    for i in PROMPT_IDS
    for k in range(4)
  ]
  write_table(tmp_path / "responses.parquet", rows, RESPONSES)
  scores = [row | {"score": float(row["response_id"] * (1 if row["prompt_id"] % 3 == 0 else -1))} for row in rows]
  write_table(tmp_path / "scores.parquet", [{k: row[k] for k in SCORES.names} for row in scores], SCORES)
  reads = {name: tmp_path / f"{name}.parquet" for name in ("responses", "scores")}
  reads |= {"train_prompts": tmp_path / "prompts.parquet", "student_initial": "initial", "student_now": "now"}
  return types.SimpleNamespace(
    config=types.SimpleNamespace(
      seed=0, student=None, mining=Mining(), evaluation=Evaluation(student_prompts=8, regret_prompts=12)
    ),
    mesh=None,
    reads=reads,
    student=lambda: None,
    load=lambda model, source: WORTH[source],
  )


def test_a_student_that_orders_backwards_and_one_that_agrees(job):
  answers = {i: [{"text": str(n)} for n in (3, 1, 1, 2)] for i in PROMPT_IDS}
  answers[11] = [{"text": "5"}] * 4  # nothing to order
  teacher = Counting()
  found = diagnose.student_quality(
    job, teacher, {i: {"prompt_id": i, "prompt": [], "checks": "[]"} for i in PROMPT_IDS}, answers
  )
  for kind in ("mined", "random"):
    assert found[f"student_accuracy_{kind}"] == {"initial": 0.0, "now": 1.0}
    low, high = found[f"student_accuracy_{kind}_ci"]["now"]
    assert 0.5 < low < high == 1.0
  assert found["student_calibration"]["initial"]["error"] > 0.7 > found["student_calibration"]["now"]["error"]
  asked = {pair.prompt.id for pair in teacher.asked}
  assert len(asked | {11}) in (8, 9) and asked < {*PROMPT_IDS}
  # Three random pairs of three different answers, and the best and the worst by each student.
  assert len(teacher.asked) == 5 * len(asked)
  assert found["student_pairs"]["now"] == {"mined": len(asked), "random": 3 * len(asked)}


def test_regret_is_what_the_pick_falls_short_of_the_best(job):
  assert diagnose.student_regret(job, Counting())["student_regret"] == {"pick": 2.0, "random": 1.5, "prompts": 12}
  job.config.evaluation = Evaluation(regret_prompts=7)
  assert diagnose.student_regret(job, Counting())["student_regret"]["prompts"] == 7


def test_regret_is_about_responses_that_mining_may_pick(job):
  job.config.mining = Mining(drop_truncated=True)
  found = diagnose.student_regret(job, Counting())["student_regret"]
  assert found == {"pick": pytest.approx(2 / 3), "random": 0.5, "prompts": 12}


def test_none_is_asked_for_where_nothing_is_wanted(job):
  job.config.evaluation = Evaluation(student_prompts=0, regret_prompts=0)
  teacher = Counting()
  assert diagnose.student_quality(job, teacher, {1: {}}, {1: []}) == {} == diagnose.student_regret(job, teacher)
  assert not teacher.asked

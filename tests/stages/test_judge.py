"""Judging as a stage: whatever the server does and wherever the process dies, verdicts are true, kept and paid once."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from chat_server import FAULTS, ChatServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import judging
from teachers.asked import KEY, endpoint, pairs, rows, truth
from teachers.asked import pair as pair_of

from tsalign_jax import loop
from tsalign_jax.config import load_config
from tsalign_jax.data.tables import read_table
from tsalign_jax.pairing.statistics import win_rate
from tsalign_jax.stages import evaluate
from tsalign_jax.stages import judge as judge_stage
from tsalign_jax.stages.judge import judge
from tsalign_jax.stages.pair import pair
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.teachers.ledger import accounts
from tsalign_jax.types import UserError, Verdict


@pytest.fixture(scope="module")
def server():
  os.environ["JUDGE_KEY"] = KEY
  with ChatServer(retry_after="0.001") as listening:
    yield listening
  del os.environ["JUDGE_KEY"]


@pytest.fixture(autouse=True)
def rested(server):
  server.reset()
  server.delay = 0.0


def teacher(server, **changes) -> dict:
  return {"kind": "llm_judge", "model": "judge-1", "endpoint": endpoint(server, backoff=0.001, **changes)}


ASKED = pairs(6)


def judged(folder: Path, config) -> dict[int, str]:
  """The verdicts after judging and pairing, of which the pairs are checked against the truth."""
  judge(judging.job("judge", config, folder))
  verdicts = {row["prompt_id"]: row["verdict"] for row in read_table(folder / "verdicts.parquet")}
  try:
    pair(judging.job("pair", config, folder))
  except UserError as error:  # no pair is left
    assert "decided no pair" in str(error) and not {*verdicts.values()} & {"first", "second"}
    return verdicts
  for row in read_table(folder / "pairs.parquet"):
    better, worse = (int(row[side][0]["content"].split()[1]) for side in ("chosen", "rejected"))
    assert better > worse and verdicts[row["prompt_id"]] in ("first", "second")
  return verdicts


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  st.lists(st.one_of(st.none(), st.sampled_from(FAULTS)), max_size=24),
  st.integers(1, 8),
  st.integers(0, 2),
  st.integers(0, 1),
)
def test_any_schedule_of_faults_leaves_each_pair_true_or_an_error_and_nothing_paid_twice(
  server, faults, concurrency, retries, reasks
):
  server.reset(faults)
  limits = {"concurrency": concurrency, "retries": retries, "reasks": reasks, "max_failure_rate": 1.0, "timeout": 0.4}
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    judging.write_inputs(folder / "one", ASKED)
    judging.write_inputs(folder / "two", ASKED)
    config = load_config(judging.config_file(folder, teacher(server, **limits)))
    verdicts = judged(folder / "one", config)
    for each in ASKED:
      assert verdicts[each.prompt.id] in (truth(each), Verdict.ERROR)
    outcomes = dict(rows(folder / "run" / "ledger.sqlite", "SELECT outcome, count(*) FROM attempts GROUP BY 1"))
    stored = rows(folder / "run" / "verdicts.sqlite", "SELECT count(*), count(DISTINCT key) FROM answers")[0]
    assert outcomes.get("answered", 0) == stored[0] == stored[1]
    assert sum(outcomes.values()) >= len(server.log)
    good = [request for request in server.charged if request.fault is None]
    # A slow machine may time out on a good answer: then it is paid for, but nobody has it.
    late = outcomes.get("timed out", 0) - sum(request.fault in ("hang", "drip", "408") for request in server.log)
    paid = Counter(request.content for request in good)
    assert 0 <= len(good) - stored[0] <= late and len(good) - len(paid) <= late

    server.reset()  # the server is well again: what failed is asked for, what is stored is not
    again = judged(folder / "two", load_config(judging.config_file(folder, teacher(server))))
    assert all(again[each.prompt.id] == truth(each) for each in ASKED)
    assert len(set(paid) & {request.content for request in server.log}) <= late


@pytest.mark.parametrize("seed", range(4))
def test_killed_and_continued_judging_gives_the_same_verdicts_and_pays_for_no_stored_answer_again(
  seed, server, tmp_path
):
  """At any point of any schedule of faults: the first has none, in the others they are a third of 60 requests."""
  random = Random(seed)
  faults = [random.choice(FAULTS) if random.random() < 1 / 3 else None for _ in range(60 if seed else 0)]
  point = random.randrange(20, 40)
  asked = pairs(45)
  for name in ("undisturbed", "killed"):
    (tmp_path / name).mkdir()
    judging.write_inputs(tmp_path / name / "inputs", asked)
    limits = {"concurrency": 3, "timeout": 2.0, "reasks": 6, "input_price": 1.0, "output_price": 1.0}
    judging.config_file(tmp_path / name, teacher(server, **limits))
  judging.run(load_config(tmp_path / "undisturbed" / "config.yaml"))
  questions = len(server.log)
  assert questions == len({request.content for request in server.log}) == 60

  server.reset(faults)
  server.delay = 0.02
  command = [sys.executable, judging.__file__, tmp_path / "killed" / "config.yaml"]
  environment = os.environ | {"PYTHONPATH": str(Path(judging.__file__).parents[1]), "JAX_PLATFORMS": "nothing"}
  process = subprocess.Popen(command, env=environment)
  while len(server.charged) < point:
    assert process.poll() is None
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  killed = tmp_path / "killed" / "run"
  stored = rows(killed / "verdicts.sqlite", "SELECT count(*) FROM answers")[0][0]
  assert not (killed / "round_01" / "verdicts.parquet").exists() and 10 <= stored < questions
  time.sleep(0.2)  # what was under way arrives
  paid = [request.content for request in server.charged if request.fault is None]
  assert len(server.log) > len(paid) or not faults
  assert len(paid) - stored <= 3 + 1  # a slot may have been taken again before its answer was noted
  assert {each.outcome: each.requests for each in accounts(killed / "ledger.sqlite")}["answered"] >= stored - 1

  server.reset()
  judging.run(load_config(tmp_path / "killed" / "config.yaml"))
  assert len(server.log) == questions - stored
  assert len(set(paid) & {request.content for request in server.log}) == len(paid) - stored
  tables = [read_table(tmp_path / name / "run/round_01/verdicts.parquet") for name in ("undisturbed", "killed")]
  assert tables[0] == tables[1] and len(tables[0]) == 45
  unknown = rows(killed / "ledger.sqlite", "SELECT count(*), min(cost) FROM attempts WHERE outcome = 'sent'")[0]
  assert unknown[0] <= 3 and (unknown[1] or 1) > 0


def test_what_failed_before_a_stop_is_asked_again_when_the_stage_goes_on(server, tmp_path, monkeypatch):
  monkeypatch.setattr(judge_stage, "BATCH", 2)
  judging.write_inputs(tmp_path / "inputs", ASKED)
  limits = {"concurrency": 1, "retries": 0, "max_failure_rate": 1.0}
  config = load_config(judging.config_file(tmp_path, teacher(server, **limits)))
  server.reset(["500", *[None] * 4, "401"])
  with pytest.raises(UserError, match="refused a request"):
    judging.run(config)
  done = [read_table(file) for file in sorted((tmp_path / "run/round_01/judge.partial").glob("*.parquet"))]
  assert [row["verdict"] == Verdict.ERROR for rows in done for row in rows].count(True) == 1
  stored = {request.content for request in server.charged}
  server.reset()
  judging.run(config)
  verdicts = read_table(tmp_path / "run/round_01/verdicts.parquet")
  assert [row["verdict"] for row in verdicts] == [truth(each) for each in ASKED]
  assert not stored & {request.content for request in server.log}


def test_one_slow_answer_holds_nobody_up(server, tmp_path, monkeypatch):
  """While one request hangs, whole batches of others go through."""
  monkeypatch.setattr(judge_stage, "BATCH", 2)
  asked = [pair_of(1, 2, number) for number in range(20)]
  judging.write_inputs(tmp_path / "inputs", asked)
  settings = teacher(server, concurrency=4, timeout=3.0) | {"both_orders": False}
  server.reset(["hang"])
  judging.run(load_config(judging.config_file(tmp_path, settings)))
  hanging = server.log[0].content
  again = next(index for index, request in enumerate(server.log) if index and request.content == hanging)
  assert again > 2 * 7
  verdicts = read_table(tmp_path / "run/round_01/verdicts.parquet")
  assert [row["verdict"] for row in verdicts] == ["second"] * 20


def test_a_teacher_that_fails_with_every_pair_leaves_the_stage_open(server, tmp_path):
  judging.write_inputs(tmp_path / "inputs", ASKED[1:3])
  config = load_config(judging.config_file(tmp_path, teacher(server, retries=0, max_failure_rate=1.0)))
  server.reset(["500"] * 4)
  with pytest.raises(UserError, match=r"round_01/judge: the teacher failed with every pair \(500: no, 500"):
    judging.run(config)
  judging.run(config)
  found = [row["verdict"] for row in read_table(tmp_path / "run/round_01/verdicts.parquet")]
  assert found == [truth(each) for each in ASKED[1:3]]


def test_without_candidates_nothing_is_asked_and_pairing_says_so(server, tmp_path):
  judging.write_inputs(tmp_path / "inputs", [])
  with pytest.raises(UserError, match=r"round_01/pair: the teacher decided no pair"):
    judging.run(load_config(judging.config_file(tmp_path, teacher(server))))
  assert not server.log and read_table(tmp_path / "run/round_01/verdicts.parquet") == []


def test_key_is_in_no_file_of_a_run(server, tmp_path):
  faults = ["429", "garbage", "waffle", "500", "reset"]
  judging.write_inputs(tmp_path / "inputs", ASKED)
  config = load_config(judging.config_file(tmp_path, teacher(server)))
  server.reset(["401"])
  with pytest.raises(UserError) as error:
    judging.run(config)
  assert KEY not in str(error.value) and "Bearer [key]" in str(error.value)
  server.reset(faults)
  judging.run(config)
  assert {request.headers["authorization"] for request in server.log} == {f"Bearer {KEY}"}
  files = [file for file in tmp_path.rglob("*") if file.is_file()]
  assert {file.name for file in files} >= {"config.yaml", "manifest.json", "verdicts.sqlite", "ledger.sqlite"}
  for file in files:
    assert KEY.encode() not in file.read_bytes(), file
  assert KEY not in repr(config)


def test_budget_stop_keeps_the_answers_and_a_raised_budget_continues_the_run(server, tmp_path):
  judging.write_inputs(tmp_path / "inputs", ASKED)
  prices = {"input_price": 1000.0, "output_price": 1.0, "budget": 1.5}
  with pytest.raises(UserError, match=r"teacher.endpoint.budget: 1.5 could be exceeded"):
    judging.run(load_config(judging.config_file(tmp_path, teacher(server, **prices))))
  paid = {request.content for request in server.charged}
  assert paid
  server.reset()
  judging.run(load_config(judging.config_file(tmp_path, teacher(server, **prices | {"budget": 9.0}))))
  assert not paid & {request.content for request in server.log}
  assert len(read_table(tmp_path / "run/round_01/verdicts.parquet")) == len(ASKED)


def test_teacher_that_changed_on_disk_is_refused_by_name(server, tmp_path):
  judging.write_inputs(tmp_path / "inputs", ASKED)
  template = tmp_path / "mine.yaml"
  template.write_text((Path(loop.__file__).parent / "teachers/prompts/pairwise.yaml").read_text())
  config = load_config(judging.config_file(tmp_path, teacher(server) | {"template": str(template)}))
  judging.run(config)
  assert str(template) in config.teacher.sources()
  template.write_text(template.read_text() + "# another rubric\n")
  with pytest.raises(UserError, match=r"teacher: this run began with 'llm_judge judge-1 \w+', which now is 'llm_judge"):
    judging.run(config)


def test_ensemble_stage_reports_agreement(server, tmp_path):
  judging.write_inputs(tmp_path / "inputs", ASKED)
  members = [teacher(server), teacher(server) | {"kind": "ranker"}, teacher(server) | {"template": "mt_bench"}]
  server.answer, honest = lambda content: "[[A]]" if "impartial" in content else honest(content), server.answer
  try:
    judging.run(load_config(judging.config_file(tmp_path, {"kind": "ensemble", "members": members})))
  finally:
    server.answer = honest
  verdicts = read_table(tmp_path / "run/round_01/verdicts.parquet")
  for each, row in zip(ASKED, verdicts, strict=True):
    wanted = truth(each) if each.first != each.second else Verdict.TIE
    assert row["verdict"] == wanted
  counts = loop.Manifest(tmp_path / "run").stages["round_01/judge"]["counts"]
  assert counts["teacher"].startswith("ensemble majority of 3 ")
  # Two of three members are honest; the third contradicts itself but for equal responses.
  equal = sum(each.first == each.second for each in ASKED)
  assert counts["agreement"] == pytest.approx((equal + (len(ASKED) - equal) * 2 / 3) / len(ASKED))


def test_evaluation_run_again_pays_nothing_again(server, tmp_path):
  config = load_config(judging.config_file(tmp_path, teacher(server)))
  job = judging.job("evaluate", config, tmp_path)
  prompts = {each.prompt.id: judging._prompt(each.prompt) for each in ASKED}
  sides = [
    {each.prompt.id: [judging._response(each.prompt.id, 0, getattr(each, side))] for each in ASKED}
    for side in ("first", "second")
  ]
  rows = [(i, sides[0][i][0], sides[1][i][0]) for i in prompts]
  found = []
  for _ in range(2):
    with build_teacher(config) as opened:
      found.append(evaluate._outcome(job, rows, evaluate._judged(prompts, rows, opened, "the teacher")))
  assert found[0] == found[1] and len(server.log) == 2 * sum(each.first != each.second for each in ASKED)
  assert found[0]["win_rate"] == win_rate([[truth(each)] for each in ASKED])


def test_a_judge_that_fails_with_every_answer_evaluates_nothing(server, tmp_path):
  config = load_config(judging.config_file(tmp_path, teacher(server, retries=0, max_failure_rate=1.0)))
  answers = [(0, {"text": "worth 1"}, {"text": "worth 2"})]
  server.reset(["500"] * 2)
  with build_teacher(config) as opened, pytest.raises(UserError, match=r"^the judge failed with every pair \(500: no"):
    evaluate._judged({0: judging._prompt(ASKED[0].prompt)}, answers, opened, "the judge")

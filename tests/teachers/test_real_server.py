"""Judge and ranker against a real server: `transformers serve` with SmolLM2. `make test-server` sets it up."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from teachers.asked import prompt, rows

from tsalign_jax.config import Endpoint, JudgeTeacher, RankerTeacher
from tsalign_jax.teachers.chat import Clock
from tsalign_jax.teachers.ledger import Outcome, accounts
from tsalign_jax.teachers.llm_judge import LLMJudge
from tsalign_jax.teachers.ranker import Ranker
from tsalign_jax.types import CandidatePair, Verdict

pytestmark = pytest.mark.server
MODEL = Path(__file__).parents[2] / "models" / "smollm2"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
  assert MODEL.is_dir(), f"{MODEL} is missing: run `make test-server`"
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [Path(sys.executable).with_name("transformers"), "serve", MODEL, "--port", str(port), "--device", "cpu"]
  log = tmp_path_factory.mktemp("server") / "log"
  with log.open("w") as out:
    process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
  try:
    _wait(f"http://127.0.0.1:{port}/health", process, log)
    yield f"http://127.0.0.1:{port}/v1"
  finally:
    process.terminate()
    process.wait(30)


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
  for _ in range(600):
    assert process.poll() is None, log.read_text()
    try:
      urllib.request.urlopen(url, timeout=1)
      return
    except (urllib.error.URLError, TimeoutError):
      time.sleep(0.5)
  raise AssertionError(f"the server did not come up: {log.read_text()}")


def common(url: str, **changes) -> dict:
  endpoint = Endpoint(
    base_url=url, api_key_env=None, concurrency=2, max_failure_rate=1.0, reasks=0, input_price=1.0, output_price=2.0
  )
  return {"model": str(MODEL), "endpoint": endpoint, "max_tokens": 8} | changes


def pairs() -> list[CandidatePair]:
  good, bad = "Warm the pot, add the leaves, wait four minutes.", "No."
  return [CandidatePair(prompt(0), good, bad), CandidatePair(prompt(1), bad, good)]


def check_ledger(run: Path, questions: int) -> None:
  """Every request is accounted for, with the tokens that the server counted."""
  bill = {each.outcome: each for each in accounts(run / "ledger.sqlite")}
  assert set(bill) <= {Outcome.ANSWERED, Outcome.MALFORMED}
  stored = rows(run / "verdicts.sqlite", "SELECT count(*), total(input_tokens), total(cost) FROM answers")[0]
  answered = bill.get(Outcome.ANSWERED)
  assert stored[0] == (answered.requests if answered else 0)
  assert sum(each.requests for each in bill.values()) == questions
  for each in bill.values():
    assert each.input_tokens > 50 * each.requests and 0 < each.output_tokens <= 8 * each.requests
    assert each.cost == pytest.approx((each.input_tokens + 2 * each.output_tokens) / 1e6)


def test_judge_returns_verdicts_or_errors_with_a_valid_ledger(url, tmp_path):
  with LLMJudge(JudgeTeacher(**common(url)), tmp_path, "teacher", Clock()) as teacher:
    judged = teacher.judge(pairs())
    spent = teacher.note()
  assert len(judged) == 2
  for each in judged:  # what two answers add up to, or the reason why one is missing
    slots, failures = ([a[key] for a in each.evidence["answers"] if key in a] for key in ("slot", "failure"))
    assert len(slots) + len(failures) == 2 and all(failures)
    agreed = {("A", "B"): Verdict.FIRST, ("B", "A"): Verdict.SECOND, ("C", "C"): Verdict.TIE}
    assert each.verdict == (Verdict.ERROR if failures else agreed.get(tuple(slots), Verdict.INCONSISTENT))
  assert "tokens, cost" in spent
  check_ledger(tmp_path, 4)


# Shown what a verdict looks like, even this small model gives one; it names B whatever B is.
TEMPLATE = """
answer: letter
messages:
  - {role: user, content: "Question: 2 + 2?\\nA: 4\\nB: 5\\nWhich is better? Say A or B only."}
  - {role: assistant, content: A}
  - {role: user, content: "Question: Capital of France?\\nA: Rome\\nB: Paris\\nWhich is better? Say A or B only."}
  - {role: assistant, content: B}
  - role: user
    content: |
      Question: {{ prompt[-1].content }}
      A: {{ first }}
      B: {{ second }}
      Which is better? Say A or B only.
"""


def test_template_with_examples_gets_readable_answers_that_are_paid_for_once(url, tmp_path):
  (tmp_path / "mine.yaml").write_text(TEMPLATE)
  settings = JudgeTeacher(template=str(tmp_path / "mine.yaml"), **common(url))
  for _ in range(2):
    with LLMJudge(settings, tmp_path, "teacher", Clock()) as teacher:
      judgement = teacher.judge(pairs()[:1])[0]
    assert judgement.verdict in (Verdict.FIRST, Verdict.SECOND, Verdict.INCONSISTENT)
    check_ledger(tmp_path, 2)


def test_ranker_returns_a_permutation_or_an_error_with_a_valid_ledger(url, tmp_path):
  with Ranker(RankerTeacher(**common(url)), tmp_path, "teacher", Clock()) as teacher:
    ranking = teacher.rank(prompt(), ["Yes, please.", "No.", "Tea tea tea."])
    judged = teacher.judge(pairs()[:1])
  assert ranking.order is None or sorted(ranking.order) == [0, 1, 2]
  assert judged[0].verdict in Verdict
  check_ledger(tmp_path, 3)


def test_logprobs_that_the_server_does_not_give_are_missed_and_not_made_up(url, tmp_path):
  settings = JudgeTeacher(verdict="logprobs", both_orders=False, **common(url))
  with LLMJudge(settings, tmp_path, "teacher", Clock()) as teacher:
    judgement = teacher.judge(pairs()[:1])[0]
  assert judgement.verdict == Verdict.ERROR and judgement.evidence["answers"][0]["failure"]

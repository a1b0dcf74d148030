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
from tsalign_jax.types import CandidatePair, Judgement, Prompt, Verdict

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


def check_judgement(judgement: Judgement) -> None:
  """It is what its two answers add up to, or says why one of them is missing."""
  answers = judgement.evidence["answers"]
  slots, failures = ([answer[key] for answer in answers if key in answer] for key in ("slot", "failure"))
  assert len(slots) + len(failures) == 2 and all(failures)
  agreed = {("A", "B"): Verdict.FIRST, ("B", "A"): Verdict.SECOND, ("C", "C"): Verdict.TIE}
  assert judgement.verdict == (Verdict.ERROR if failures else agreed.get(tuple(slots), Verdict.INCONSISTENT))


def check_ledger(run: Path, questions: int, longest: int = 8) -> None:
  """Every request is accounted for, with the tokens that the server counted."""
  bill = {each.outcome: each for each in accounts(run / "ledger.sqlite")}
  assert set(bill) <= {Outcome.ANSWERED, Outcome.MALFORMED}
  stored = rows(run / "verdicts.sqlite", "SELECT count(*), total(input_tokens), total(cost) FROM answers")[0]
  answered = bill.get(Outcome.ANSWERED)
  assert stored[0] == (answered.requests if answered else 0)
  assert sum(each.requests for each in bill.values()) == questions
  for each in bill.values():
    assert each.input_tokens > 50 * each.requests and 0 < each.output_tokens <= longest * each.requests
    assert each.cost == pytest.approx((each.input_tokens + 2 * each.output_tokens) / 1e6)


def test_judge_returns_verdicts_or_errors_with_a_valid_ledger(url, tmp_path):
  with LLMJudge(JudgeTeacher(**common(url)), tmp_path, "teacher", Clock()) as teacher:
    judged = teacher.judge(pairs())
    spent = teacher.note()
  assert len(judged) == 2
  for each in judged:
    check_judgement(each)
  assert "tokens, cost" in spent
  check_ledger(tmp_path, 4)


# Shown what a verdict looks like, even this small model gives one; it names B whatever B is.
TEMPLATE = r"""
answer: letter
messages:
  - {role: user, content: "Question: 2 + 2?\nA: 4\nB: 5\nWhich is better? Say A or B only."}
  - {role: assistant, content: A}
  - {role: user, content: "Question: Capital of France?\nA: Rome\nB: Paris\nWhich is better? Say A or B only."}
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


# Shown rankings in turns of their own, it gives one as well.
RANKING = r"""
answer: ranking
messages:
  - {role: user, content: "Rank these answers to: 2 + 2?\n[1] 5\n[2] 4\n[3] a fish"}
  - {role: assistant, content: "[2] > [1] > [3]"}
  - {role: user, content: "Rank these answers to: Capital of France?\n[1] Rome\n[2] a fish\n[3] Paris"}
  - {role: assistant, content: "[3] > [1] > [2]"}
  - role: user
    content: |
      {% for example in demonstrations %}
      {{ example.responses | join(", ") }}: [{{ example.ranking | join("] > [") }}]
      {% endfor %}
      Rank these answers to: {{ prompt[-1].content }}
      {% for response in responses %}
      [{{ loop.index }}] {{ response }}
      {% endfor %}
"""


def test_ranker_gives_a_permutation_that_is_paid_for_once(url, tmp_path):
  (tmp_path / "mine.yaml").write_text(RANKING)
  settings = RankerTeacher(template=str(tmp_path / "mine.yaml"), **common(url, max_tokens=16))
  tea = Prompt(0, [{"role": "user", "content": "Tea?"}])
  for _ in range(2):
    with Ranker(settings, tmp_path, "teacher", Clock()) as teacher:
      ranking = teacher.rank(tea, ["Yes, please.", "No.", "Tea tea tea."])
    assert ranking.order is not None, ranking.evidence
    assert sorted(ranking.order) == [0, 1, 2]
    check_ledger(tmp_path, 1, longest=16)


def test_ranker_as_a_judge_returns_a_verdict_or_an_error_with_a_valid_ledger(url, tmp_path):
  with Ranker(RankerTeacher(**common(url)), tmp_path, "teacher", Clock()) as teacher:
    check_judgement(teacher.judge(pairs()[:1])[0])
  check_ledger(tmp_path, 2)


def test_logprobs_that_the_server_does_not_give_are_missed_and_not_made_up(url, tmp_path):
  settings = JudgeTeacher(verdict="logprobs", both_orders=False, **common(url))
  with LLMJudge(settings, tmp_path, "teacher", Clock()) as teacher:
    judgement = teacher.judge(pairs()[:1])[0]
  assert judgement.verdict == Verdict.ERROR and judgement.evidence["answers"][0]["failure"]

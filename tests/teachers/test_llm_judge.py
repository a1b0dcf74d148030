"""The llm_judge teacher against a server that fails on command: verdicts, retries, stops, money, and the key."""

import asyncio
import contextlib
import dataclasses
import itertools
import math
import re
import socket
import sqlite3
import time

import pytest
from chat_server import FAULTS, REFUSALS, TRANSIENT, UNREADABLE, completion
from chat_server import truth as honest
from teachers.asked import KEY, Waits, judge, pair, pairs, prompt, rows, truth

from tsalign_jax.teachers.ledger import accounts
from tsalign_jax.teachers.store import VerdictStore
from tsalign_jax.types import UserError, Verdict

PRICES = {"input_price": 1000.0, "output_price": 1000.0}  # an answer of the test server costs 0.11


def test_both_orders_are_asked_and_agree_with_an_honest_model(server, tmp_path):
  asked = pairs(9)
  with judge(server, tmp_path) as teacher:
    judged = teacher.judge(asked)
  assert [each.verdict for each in judged] == [truth(each) for each in asked]
  assert {Verdict.FIRST, Verdict.SECOND, Verdict.TIE} == {each.verdict for each in judged}
  assert len(server.log) == 2 * sum(each.first != each.second for each in asked)
  decided = judged[[each.verdict for each in judged].index(Verdict.FIRST)]
  assert [answer["slot"] for answer in decided.evidence["answers"]] == ["A", "B"] and decided.probability is None


def test_teacher_may_be_opened_again(server, tmp_path):
  teacher = judge(server, tmp_path)
  for number in range(2):
    with teacher:
      assert teacher.judge([pair(1, 2, number)])[0].verdict == Verdict.SECOND


def test_equal_responses_are_a_tie_that_costs_nothing(server, tmp_path):
  with judge(server, tmp_path) as teacher:
    assert teacher.judge([pair(3, 3)])[0].verdict == Verdict.TIE
  assert not server.log


def test_model_that_likes_a_slot_contradicts_itself(server, tmp_path):
  server.answer = lambda content: "A"
  with judge(server, tmp_path) as teacher:
    assert {each.verdict for each in teacher.judge([pair(1, 2), pair(2, 1)])} == {Verdict.INCONSISTENT}


def test_a_side_against_a_tie_is_a_contradiction_too(server, tmp_path):
  server.answer = lambda content: "C" if re.search("response_a>\nworth 1", content) else "A"
  with judge(server, tmp_path) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.INCONSISTENT


def test_one_order_costs_half_and_has_another_identity(server, tmp_path):
  with judge(server, tmp_path, both_orders=False) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.SECOND
  assert len(server.log) == 1 and teacher.identity != judge(server, tmp_path).identity
  with judge(server, tmp_path) as both:
    assert both.judge([pair(1, 2)])[0].verdict == Verdict.SECOND
  assert len(server.log) == 2  # what was bought in one order serves in both


def test_in_one_order_a_liking_for_a_slot_favours_neither_side(server, tmp_path):
  server.answer = lambda content: "A"
  asked = [pair(1, 2, number) for number in range(60)]
  with judge(server, tmp_path, both_orders=False) as teacher:
    judged = [each.verdict for each in teacher.judge(asked)]
    swapped = [each.verdict for each in teacher.judge([pair(2, 1, number) for number in range(60)])]
  assert 18 < judged.count(Verdict.FIRST) < 42 and judged.count(Verdict.SECOND) == 60 - judged.count(Verdict.FIRST)
  mirrored = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}
  assert swapped == [mirrored[verdict] for verdict in judged] and len(server.log) == 60


@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_that_passes_leaves_the_truth(fault, server, tmp_path):
  server.reset([fault])
  waits = Waits()
  with judge(server, tmp_path, waits, on={"timeout": 0.5}) as teacher:
    assert [each.verdict for each in teacher.judge([pair(1, 2), pair(2, 0)])] == [Verdict.SECOND, Verdict.FIRST]
  assert len(server.log) >= 5 and len(waits) >= (fault in TRANSIENT)


@pytest.mark.parametrize("fault", UNREADABLE)
def test_unreadable_answers_are_asked_for_again_a_stated_number_of_times_and_then_an_error(fault, server, tmp_path):
  server.reset([fault] * 9)
  with judge(server, tmp_path, both_orders=False, on={"reasks": 3}) as teacher:
    judgement = teacher.judge([pair(1, 2)])[0]
  assert judgement.verdict == Verdict.ERROR and judgement.evidence["answers"][0]["failure"]
  assert len(server.log) == 4
  assert rows(tmp_path / "verdicts.sqlite", "SELECT * FROM answers") == []
  assert rows(tmp_path / "ledger.sqlite", "SELECT outcome, count(*) FROM attempts GROUP BY 1") == [("malformed", 4)]


def test_failure_is_never_remembered_as_a_verdict(server, tmp_path):
  server.reset(["waffle"] * 3)
  for expected in (Verdict.ERROR, Verdict.SECOND):
    with judge(server, tmp_path, both_orders=False) as teacher:
      assert teacher.judge([pair(1, 2)])[0].verdict == expected


def test_requests_are_sent_again_a_stated_number_of_times(server, tmp_path):
  server.reset(["500"] * 9)
  waits = Waits()
  with judge(server, tmp_path, waits, both_orders=False, on={"retries": 3, "backoff": 2.0}) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.ERROR
  assert len(server.log) == 4
  assert [1 <= waits[0] <= 2, 2 <= waits[1] <= 4, 4 <= waits[2] <= 8, len(waits)] == [True, True, True, 3]


def test_retry_after_is_waited_for(server, tmp_path):
  server.reset(["429", "429"])
  waits = Waits()
  with judge(server, tmp_path, waits, both_orders=False) as teacher:
    teacher.judge([pair(1, 2)])
  assert len(waits) == 2 and all(7 <= wait <= 8 for wait in waits)


def test_server_that_asks_for_more_patience_than_allowed_has_failed(server, tmp_path):
  server.reset(["429"])
  server.retry_after = "3600"
  waits = Waits()
  with judge(server, tmp_path, waits, both_orders=False) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.ERROR
  assert waits == [] and len(server.log) == 1


def test_nothing_listens(server, tmp_path):
  waits, on = Waits(), {**PRICES, "base_url": "http://127.0.0.1:9/v1"}
  with judge(server, tmp_path, waits, both_orders=False, on=on) as teacher:
    judgement = teacher.judge([pair(1, 2)])[0]
  assert judgement.verdict == Verdict.ERROR and "no connection" in judgement.evidence["answers"][0]["failure"]
  assert len(waits) == 6
  found = rows(tmp_path / "ledger.sqlite", "SELECT outcome, count(*), total(cost) FROM attempts GROUP BY 1")
  assert found == [("unreached", 7, 0.0)]  # whom nobody heard, nobody charges


def test_nobody_accepts_connections(server, tmp_path):
  """As behind a firewall: a connection is neither made nor refused."""
  with socket.socket() as deaf, contextlib.ExitStack() as waiting:
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(0)
    for _ in range(2):  # fill the queue of those that nobody accepts
      line = waiting.enter_context(socket.socket())
      line.setblocking(False)
      line.connect_ex(deaf.getsockname())
    on = {**PRICES, "base_url": f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", "timeout": 0.6, "retries": 1}
    with judge(server, tmp_path, both_orders=False, on=on) as teacher:
      assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.ERROR
  found = rows(tmp_path / "ledger.sqlite", "SELECT outcome, count(*), total(cost) FROM attempts GROUP BY 1")
  assert found == [("unreached", 2, 0.0)]


@pytest.mark.parametrize("status", REFUSALS)
def test_refusal_stops_at_once_with_the_servers_message_and_keeps_what_was_under_way(status, server, tmp_path):
  server.reset([status])
  server.delay = 0.2
  message = rf"^teacher: {server.url} refused a request \({status}: no, {status}"
  with pytest.raises(UserError, match=message) as error, judge(server, tmp_path, on={"concurrency": 4}) as teacher:
    teacher.judge(pairs(30))
  assert KEY not in str(error.value)
  (refused,) = (request for request in server.log if request.fault)
  assert re.search(r"about the prompt '(Question .\?)'", str(error.value))[1] in refused.content
  assert len(server.log) == 4  # sent at once; nothing was sent after the refusal
  assert len(rows(tmp_path / "verdicts.sqlite", "SELECT * FROM answers")) == len(server.charged) == 3


def test_no_more_requests_are_under_way_than_allowed(server, tmp_path):
  now, most = 0, 0
  respond = server._respond

  async def counted(*arguments):
    nonlocal now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.01)
    try:
      return await respond(*arguments)
    finally:
      now -= 1

  server._respond = counted
  with judge(server, tmp_path, on={"concurrency": 3}) as teacher:
    teacher.judge(pairs(12))
  assert most == 3


def test_nothing_is_paid_twice_within_a_batch_between_batches_or_between_runs(server, tmp_path):
  shared = tmp_path / "shared.sqlite"
  with judge(server, tmp_path / "one", store=shared) as teacher:
    twice = teacher.judge([pair(1, 2), pair(1, 2), pair(2, 1)])
    futures = [teacher.submit([pair(1, 2), pair(0, 2)]) for _ in range(3)]
    again = [future.result() for future in futures]
  assert [each.verdict for each in twice] == [Verdict.SECOND, Verdict.SECOND, Verdict.FIRST]
  assert again[0] == again[1] == again[2] and again[0][0] == twice[0]
  assert len(server.log) == 4
  with judge(server, tmp_path / "two", store=shared) as teacher:
    assert teacher.judge([pair(1, 2), pair(0, 2)]) == again[0]
  assert len(server.log) == 4 and not (tmp_path / "one" / "verdicts.sqlite").exists()
  assert len(rows(tmp_path / "one" / "ledger.sqlite", "SELECT * FROM attempts")) == 4
  assert rows(tmp_path / "two" / "ledger.sqlite", "SELECT * FROM attempts") == []


def test_only_the_time_of_requests_counts_as_work(server, tmp_path):
  times = itertools.count()
  server.delay = 0.05
  with judge(server, tmp_path) as teacher:
    teacher._asker._clock = dataclasses.replace(teacher._asker._clock, now=lambda: float(next(times)))
    assert teacher.worked() == (0, 0)
    [future] = teacher.ahead([pair(1, 2), pair(1, 1)])
    assert future.result()[0].verdict == Verdict.SECOND
    once = teacher.worked()
    assert once.pairs == 1 and once.seconds > 0
    teacher.judge([pair(1, 2)])  # stored
    assert teacher.worked() == once


def test_another_teacher_template_or_sampling_asks_anew(server, tmp_path):
  server.answer = lambda content: "[[A]]" if "impartial" in content else honest(content)
  variants = [{}, {"temperature": 1.0}, {"max_tokens": 7}, {"extra_body": {"top_p": 0.5}}, {"template": "mt_bench"}]
  for number, changes in enumerate(variants, 1):
    with judge(server, tmp_path, both_orders=False, **changes) as teacher:
      teacher.judge([pair(1, 2)])
    assert len(server.log) == number
  assert len({judge(server, tmp_path, **changes).identity for changes in variants}) == len(variants)


def test_request_holds_what_the_configuration_says(server, tmp_path):
  on = {"limit_field": "max_completion_tokens"}
  settings = {"temperature": None, "max_tokens": 7, "extra_body": {"reasoning_effort": "low"}, "both_orders": False}
  with judge(server, tmp_path, on=on, **settings) as teacher:
    teacher.judge([pair(1, 2)])
  body = dict(server.log[0].body)
  assert len(body.pop("messages")) == 2
  assert body == {"model": "judge-1", "max_completion_tokens": 7, "reasoning_effort": "low"}
  assert server.log[0].headers["authorization"] == f"Bearer {KEY}"


def test_too_many_failures_stop_the_stage_with_everything_kept(server, tmp_path):
  asked = pairs(40)
  server.reset([None] * 20 + ["500"] * 1000)
  on = {"retries": 1, "max_failure_rate": 0.1, "concurrency": 2}
  message = r"more than teacher.endpoint.max_failure_rate = 0.1 allows \(the last: 500: .*run the same command again"
  with pytest.raises(UserError, match=message), judge(server, tmp_path, on=on) as teacher:
    teacher.judge(asked)
  questions = 2 * sum(each.first != each.second for each in asked)
  limit = 5  # more than a tenth of 40
  assert questions > 50
  assert 20 + 2 * limit <= len(server.log) <= 20 + 2 * limit + 2
  kept = {request.content for request in server.charged}
  server.reset()
  with judge(server, tmp_path, on=on) as teacher:
    assert [each.verdict for each in teacher.judge(asked)] == [truth(each) for each in asked]
  assert not kept & {request.content for request in server.log}
  # Answers that are stored say nothing about a server that is down now.
  server.reset(["500"] * 1000)
  with pytest.raises(UserError, match=message), judge(server, tmp_path, on=on) as teacher:
    teacher.judge([*asked, *(pair(1, 2, number) for number in range(100, 104))])


def test_few_failures_among_few_questions_do_not_stop(server, tmp_path):
  server.reset(["waffle"] * 3)
  with judge(server, tmp_path, on={"concurrency": 1}) as teacher:
    assert [each.verdict for each in teacher.judge([pair(1, 2, 0), pair(2, 1, 1)])].count(Verdict.ERROR) == 1


def test_budget_is_never_exceeded_and_raising_it_continues(server, tmp_path):
  asked, spent = pairs(12), []
  on = {**PRICES, "budget": 2.5, "concurrency": 8}
  message = r"teacher.endpoint.budget: 2.5 could be exceeded by the next request \(.* is spent"
  with pytest.raises(UserError, match=message), judge(server, tmp_path, on=on, max_tokens=5) as teacher:
    teacher.judge(asked)
  cost = 0.11 * len(server.charged)
  worst = (256 + sum(16 + len(message["content"]) for message in server.log[0].body["messages"]) + 5) / 1000
  assert 2.5 - worst < cost <= 2.5
  assert rows(tmp_path / "ledger.sqlite", "SELECT total(cost) FROM attempts")[0][0] == pytest.approx(cost)
  kept = {request.content for request in server.charged}
  server.reset()
  with judge(server, tmp_path, on=on | {"budget": 20.0}, max_tokens=5) as teacher:
    assert [each.verdict for each in teacher.judge(asked)] == [truth(each) for each in asked]
    spent.append(teacher.note())
  assert not kept & {request.content for request in server.log}
  total = cost + 0.11 * len(server.charged)
  assert spent == [f"{round(total / 0.11) * 110:,} tokens, cost {total:.2f}"]


def test_request_whose_cost_is_unknown_counts_at_its_worst(server, tmp_path):
  server.reset(["hang", "reset", "500", "429", "504"])
  with judge(server, tmp_path, both_orders=False, on={**PRICES, "timeout": 1.5}, max_tokens=5) as teacher:
    teacher.judge([pair(1, 2)])
  found = rows(tmp_path / "ledger.sqlite", "SELECT outcome, cost FROM attempts ORDER BY id")
  outcomes, (timed_out, dropped, server_error, rate_limited, gateway, answered) = zip(*found, strict=True)
  assert outcomes == ("timed out", "dropped", "server error", "rate limited", "timed out", "answered")
  assert answered == pytest.approx(0.11) and server_error == rate_limited == 0.0
  assert 1.0 < timed_out == dropped == gateway < 3.0


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 100}, {"prompt_tokens": 1, "completion_tokens": -1}, 7])
def test_answer_without_usage_counts_at_its_worst(usage, server, tmp_path):
  server.answer = lambda content: completion("A") | {"usage": usage}
  with judge(server, tmp_path, both_orders=False, on=PRICES, max_tokens=5) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict != Verdict.ERROR
  assert rows(tmp_path / "ledger.sqlite", "SELECT cost > 1.0 FROM attempts") == [(1,)]


def test_server_that_ignores_the_limit_is_named_where_there_is_a_budget(server, tmp_path):
  server.answer = lambda content: completion("A") | {"usage": {"prompt_tokens": 100, "completion_tokens": 99999}}
  message = r"teacher.endpoint.limit_field: .* used more tokens \(100 \+ 99999\)"
  on = {**PRICES, "budget": 10.0}
  with pytest.raises(UserError, match=message), judge(server, tmp_path, on=on) as teacher:
    teacher.judge([pair(1, 2)])
  assert len(rows(tmp_path / "verdicts.sqlite", "SELECT * FROM answers")) == len(server.charged)


def test_server_that_counts_more_input_than_there_is_does_not_blame_the_limit(server, tmp_path):
  server.answer = lambda content: completion("A") | {"usage": {"prompt_tokens": 99999, "completion_tokens": 1}}
  message = r"teacher.endpoint.budget: .* used more tokens \(99999 \+ 1\)"
  on = {**PRICES, "budget": 10.0}
  with pytest.raises(UserError, match=message), judge(server, tmp_path, on=on) as teacher:
    teacher.judge([pair(1, 2)])


def test_key_must_be_in_the_environment(server, tmp_path, monkeypatch):
  monkeypatch.delenv("JUDGE_KEY")
  with pytest.raises(UserError, match=r"teacher.endpoint.api_key_env: the environment variable JUDGE_KEY is not set"):
    judge(server, tmp_path)
  with judge(server, tmp_path, both_orders=False, on={"api_key_env": None}) as teacher:
    teacher.judge([pair(1, 2)])
  assert server.log[0].headers["authorization"] == "Bearer none"


@pytest.mark.parametrize("key", ["sk-secret-one\nsecret-two", "sk-secret one", "sk-sécret-one", "sk-secret\x07one"])
def test_key_that_no_header_could_carry_is_refused_and_not_repeated(key, server, tmp_path, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", key)
  with pytest.raises(UserError, match=r"the environment variable JUDGE_KEY holds a space, a line break") as error:
    judge(server, tmp_path)
  assert "cret" not in str(error.value)


@pytest.mark.parametrize("key", [KEY, 'sk-a-key\\with-a-"quote'])
def test_key_in_the_configuration_is_refused_and_not_repeated(key, server, tmp_path, monkeypatch):
  monkeypatch.setenv("JUDGE_KEY", key)
  for body in ({"token": f"Bearer {key}"}, {"tokens": [{key: 1}]}):
    with pytest.raises(UserError, match="teacher: holds the key itself") as error:
      judge(server, tmp_path, extra_body=body)
    assert key not in str(error.value)


def test_key_that_the_server_repeats_is_taken_out_of_evidence_and_files(server, tmp_path):
  server.answer = lambda content: completion(f"<think>I was called with {KEY}.</think>A") | {"model": KEY}
  with judge(server, tmp_path) as teacher:
    judgement = teacher.judge([pair(1, 2)])[0]
  assert KEY not in str(judgement) and "[key]" in str(judgement)
  assert not [file for file in tmp_path.rglob("*") if KEY.encode() in file.read_bytes()]


def logprobs(text, **letters):
  """A completion whose first token could have been these letters, with these probabilities."""
  likeliest = [{"token": letter, "logprob": math.log(p)} for letter, p in letters.items()]
  return completion(text, logprobs={"content": [{"token": text, "logprob": -1.0, "top_logprobs": likeliest}]})


def test_verdict_by_logprobs_is_the_likeliest_letter_and_its_probability_that_of_both_orders(server, tmp_path):
  # The sampled letter is the less likely one; slot A is liked too much, which the mean over the orders undoes.
  server.answer = lambda content: (
    logprobs("B", A=0.9, B=0.1) if honest(content) == "A" else logprobs("A", A=0.3, B=0.6, C=0.1)
  )
  with judge(server, tmp_path, verdict="logprobs") as teacher:
    better, worse = teacher.judge([pair(2, 1), pair(1, 2)])
  assert (better.verdict, worse.verdict) == (Verdict.FIRST, Verdict.SECOND)
  assert better.probability == pytest.approx((0.9 + 1 - 0.35) / 2) and worse.probability == pytest.approx(1 - 0.775)
  assert server.log[0].body["logprobs"] is True and server.log[0].body["top_logprobs"] == 20


def test_logprobs_of_the_letter_are_enough_where_the_limit_cuts_the_rest(server, tmp_path):
  cut = {"finish_reason": "length"}
  server.answer = lambda content: logprobs("A", **{honest(content): 0.9, "C": 0.1}) | {"x": 1}
  with judge(server, tmp_path, verdict="logprobs", both_orders=False) as teacher:
    assert teacher.judge([pair(2, 1)])[0].verdict == Verdict.FIRST
  server.answer = lambda content: completion("A", **cut)
  with judge(server, tmp_path, both_orders=False) as teacher:
    judgement = teacher.judge([pair(2, 1)])[0]
  assert judgement.verdict == Verdict.ERROR and "cut off by max_tokens" in str(judgement.evidence)


def test_logprobs_that_nobody_asked_for_and_nobody_can_read_cost_no_answer(server, tmp_path):
  strange = [None, [], 3, {"content": 3}, {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": None}]}]
  with judge(server, tmp_path, both_orders=False) as teacher:
    for number, value in enumerate(strange):
      server.answer = lambda content, value=value: completion("C", logprobs=value)
      assert teacher.judge([pair(1, 2, number)])[0].verdict == Verdict.TIE
  assert len(server.log) == len(strange)


@pytest.mark.parametrize(
  "answer", [completion("A"), logprobs("A", X=1.0), logprobs("AB", A=1.0), logprobs("A", A=math.exp(700.0))]
)
def test_answer_without_the_logprobs_asked_for_is_an_error(answer, server, tmp_path):
  server.answer = lambda content: answer
  with judge(server, tmp_path, verdict="logprobs", both_orders=False) as teacher:
    assert teacher.judge([pair(2, 1)])[0].verdict == Verdict.ERROR


@pytest.mark.parametrize("open_end", ["<think>[[A]] or", "So.</think> No, <think>[[A]]"])
def test_thoughts_that_do_not_end_are_no_verdict(open_end, server, tmp_path):
  server.answer = lambda content: open_end
  with judge(server, tmp_path, template="mt_bench", both_orders=False) as teacher:
    judgement = teacher.judge([pair(2, 1)])[0]
  assert judgement.verdict == Verdict.ERROR and "in the middle of its thoughts" in str(judgement.evidence)


def test_answer_withheld_by_a_filter_is_an_error(server, tmp_path):
  server.answer = lambda content: completion("A", finish_reason="content_filter")
  with judge(server, tmp_path, both_orders=False) as teacher:
    assert "content filter" in str(teacher.judge([pair(2, 1)])[0].evidence)


def test_answer_that_is_no_valid_text_is_an_error(server, tmp_path):
  server.answer = lambda content: completion("A \ud800 <think>")
  with judge(server, tmp_path, both_orders=False) as teacher:
    assert teacher.judge([pair(2, 1)])[0].verdict == Verdict.ERROR


def test_mt_bench_reads_the_mark_after_the_reasons(server, tmp_path):
  server.answer = lambda content: (
    f"A is short, B is long.\n\n[[{'A' if content.index('worth 2') < content.index('worth 1') else 'B'}]]"
  )
  with judge(server, tmp_path, template="mt_bench", both_orders=False) as teacher:
    assert teacher.judge([pair(2, 1)])[0].verdict == Verdict.FIRST


def test_judging_goes_on_while_the_caller_does_something_else(server, tmp_path):
  server.delay = 0.6
  with judge(server, tmp_path) as teacher:
    future = teacher.submit([pair(1, 2)])
    assert not future.done()
    assert future.result()[0].verdict == Verdict.SECOND


def test_interrupt_does_not_wait_for_the_server(server, tmp_path):
  server.reset(["hang"] * 50)
  started = time.monotonic()
  with pytest.raises(KeyboardInterrupt), judge(server, tmp_path, on={"timeout": 60.0}) as teacher:
    teacher.submit(pairs(4))
    while not server.log:
      time.sleep(0.01)
    raise KeyboardInterrupt
  assert time.monotonic() - started < 30
  assert {outcome for (outcome,) in rows(tmp_path / "ledger.sqlite", "SELECT outcome FROM attempts")} == {"sent"}


@pytest.mark.parametrize(
  ("trouble", "said"),
  [
    (sqlite3.OperationalError("disk is full"), r"stored \(disk is full\); .*verdicts.sqlite and .*ledger.sqlite"),
    (RuntimeError("a mistake of ours"), "a mistake of ours"),
  ],
)
def test_trouble_with_an_answer_stops_all_and_nobody_waits_for_its_end(trouble, said, server, tmp_path, monkeypatch):
  """With room in the budget for one request at a time, so that all others wait for the first one's end."""
  put, room = VerdictStore.put, iter([True, True])

  def fill(self, *answer):
    if not next(room, False):
      raise trouble
    return put(self, *answer)

  on = {**PRICES, "budget": 3.0, "concurrency": 4}
  with judge(server, tmp_path, on=on, max_tokens=5) as teacher:
    monkeypatch.setattr(VerdictStore, "put", fill)
    raised = [teacher.submit([pair(1, 2, n)]).exception for n in range(4)]
    errors = [error for each in raised if (error := each(timeout=30))]
    assert len(errors) >= 3 and any(re.search(said, str(error)) for error in errors)
  assert rows(tmp_path / "verdicts.sqlite", "SELECT count(*) FROM answers") == [(2,)]
  assert rows(tmp_path / "ledger.sqlite", "SELECT count(*) FROM attempts WHERE outcome = 'answered'") == [(2,)]


def test_question_that_is_ended_before_it_begins_hears_why(server, tmp_path):
  """As when another batch has to stop in the very moment in which this one is asked about."""
  with judge(server, tmp_path) as teacher:
    asker = teacher._asker

    async def interrupted():
      asking = asyncio.create_task(asker.ask([teacher.question(prompt(0), "x", "y")]))
      await asyncio.sleep(0)  # asked, and the question is yet to begin
      asker._stopped = UserError("the reason")
      await asker._drain(())
      await asking

    with pytest.raises(UserError, match="the reason"):
      asker.run(interrupted()).result()


def test_file_that_is_no_store_is_named(server, tmp_path):
  (tmp_path / "verdicts.sqlite").write_text("not a database, but long enough to be looked at" * 10)
  with pytest.raises(UserError, match=r"verdicts.sqlite: cannot be used as an SQLite file"), judge(server, tmp_path):
    pass


def test_file_that_is_no_ledger_is_named_by_whoever_reads_it(tmp_path):
  (tmp_path / "ledger.sqlite").write_text("not a database, but long enough to be looked at" * 10)
  with pytest.raises(UserError, match=r"ledger.sqlite: cannot be read as an SQLite file"):
    accounts(tmp_path / "ledger.sqlite")

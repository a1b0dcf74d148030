"""The ranker: n responses in order, by demonstrations, through the same client and store as the judge."""

import json

import pytest
from chat_server import UNREADABLE, completion
from teachers.asked import pair, prompt, ranker, rows

from tsalign_jax.types import CandidateList, Demonstration, UserError, Verdict

RESPONSES = ["worth 3", "worth 9", "worth 1", "worth 5"]
EXAMPLE = Demonstration([{"role": "user", "content": "Which?"}], ["worth 70", "worth 80"], [1, 0])


def test_responses_come_back_best_first(server, tmp_path):
  with ranker(server, tmp_path) as teacher:
    ranking = teacher.rank(prompt(), RESPONSES)
  assert ranking.order == (1, 3, 0, 2) and ranking.evidence == {"text": "[2] > [4] > [1] > [3]"}


def test_lists_are_ranked_at_once_and_paid_for_once(server, tmp_path):
  lists = [CandidateList(prompt(n), RESPONSES[: 2 + n % 3]) for n in range(6)]
  with ranker(server, tmp_path) as teacher:
    first = teacher.rank_lists(lists)
    assert teacher.rank_lists(lists) == first
  assert [each.order for each in first[:3]] == [(1, 0), (1, 0, 2), (1, 3, 0, 2)]
  assert len(server.log) == 6


@pytest.mark.parametrize("fault", UNREADABLE)
def test_what_is_no_permutation_is_an_error(fault, server, tmp_path):
  server.reset([fault] * 3)
  with ranker(server, tmp_path) as teacher:
    ranking = teacher.rank(prompt(), RESPONSES)
  assert ranking.order is None and ranking.evidence["failure"]
  assert len(server.log) == 3


@pytest.mark.parametrize(
  ("answer", "said"),
  [
    (completion("[2] > [4] > [1] > [3]", finish_reason="length"), "cut off by max_tokens"),
    (completion("[2] > [4] > [1] > [3]", finish_reason="content_filter"), "content filter"),
    (completion("<think>Perhaps [2] > [4]"), "in the middle of its thoughts"),
    (completion("<think>" + "hm " * 99 + "</think>I cannot."), "4 responses: 'I cannot.'"),
  ],
)
def test_what_went_wrong_is_said(answer, said, server, tmp_path):
  server.answer = lambda content: answer
  with ranker(server, tmp_path) as teacher:
    ranking = teacher.rank(prompt(), RESPONSES)
  assert ranking.order is None and said in ranking.evidence["failure"]


def test_dynamic_demonstrations_are_shown_and_are_part_of_the_question(server, tmp_path):
  with ranker(server, tmp_path) as teacher:
    teacher.rank(prompt(), RESPONSES)
    teacher.rank(prompt(), RESPONSES, [EXAMPLE])
  assert len(server.log) == 2
  assert "Example" not in server.log[0].content and "Ranking: [2] > [1]" in server.log[1].content


def write(file, *rows):
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def test_static_demonstrations_stand_before_every_question_and_change_the_identity(server, tmp_path):
  row = {"prompt": "Which?", "responses": ["worth 70", "worth 80"], "ranking": [2, 1]}
  file = write(tmp_path / "shown.jsonl", row)
  with ranker(server, tmp_path, demonstrations=file) as teacher:
    assert teacher.rank(prompt(), RESPONSES, [EXAMPLE]).order == (1, 3, 0, 2)
  assert server.log[0].content.count("Ranking: [2] > [1]") == 2
  changed = write(tmp_path / "shown.jsonl", row | {"ranking": [1, 2]})
  assert len({each.identity for each in (teacher, ranker(server, tmp_path))}) == 2
  assert ranker(server, tmp_path, demonstrations=changed).identity != teacher.identity


WRONG = {
  "no responses": ({"prompt": "x", "ranking": [1]}, "`responses` is a list of two texts"),
  "one response": ({"prompt": "x", "responses": ["a"], "ranking": [1]}, "`responses` is a list of two texts"),
  "no permutation": ({"prompt": "x", "responses": ["a", "b"], "ranking": [1, 1]}, "each number from 1 to 2 once"),
  "from zero": ({"prompt": "x", "responses": ["a", "b"], "ranking": [0, 1]}, "each number from 1 to 2 once"),
  "no prompt": ({"responses": ["a", "b"], "ranking": [2, 1]}, "a prompt is text or a list of messages"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_demonstration_is_named(case, server, tmp_path):
  row, words = WRONG[case]
  good = {"prompt": "x", "responses": ["a", "b"], "ranking": [2, 1]}
  with pytest.raises(UserError) as error:
    ranker(server, tmp_path, demonstrations=write(tmp_path / "shown.jsonl", good, row))
  assert "shown.jsonl: row 2: " in str(error.value) and words in str(error.value)


def test_pair_is_judged_by_ranking_it_in_both_orders(server, tmp_path):
  with ranker(server, tmp_path) as teacher:
    assert [each.verdict for each in teacher.judge([pair(1, 2), pair(2, 1)])] == [Verdict.SECOND, Verdict.FIRST]
    evidence = teacher.judge([pair(1, 2)])[0].evidence
    assert teacher.rank(prompt(), ["worth 1", "worth 2"]).order == (1, 0)
  assert [answer["slot"] for answer in evidence["answers"]] == ["B", "A"]
  assert len(server.log) == 2
  assert rows(tmp_path / "verdicts.sqlite", "SELECT DISTINCT reading FROM answers ORDER BY 1") == [
    ("1 > 2",),
    ("2 > 1",),
  ]


def test_ranker_that_likes_a_slot_contradicts_itself(server, tmp_path):
  server.answer = lambda content: "[1] > [2]"
  with ranker(server, tmp_path) as teacher:
    assert teacher.judge([pair(1, 2)])[0].verdict == Verdict.INCONSISTENT

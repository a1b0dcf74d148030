"""What verdicts and evidence say of a teacher."""

import pytest

from tsalign_jax.teachers.statistics import Judged, by_member, statistics
from tsalign_jax.types import Verdict

F, S, T, I, E = Verdict


def judged(verdict, *slots, first="long response", second="short"):
  answers = [{"slot": slot} if slot else {"failure": "lost"} for slot in slots]
  return Judged(first, second, verdict, {"answers": answers} if slots else {})


ASKED = [
  judged(F, "A", "B"),
  judged(S, "B", "A"),
  judged(I, "A", "A"),
  judged(I, "A", "C"),
  judged(T, "C", "C"),
  judged(E, "A", None),
  judged(S, "B", "A", first="same", second="size"),
]


def test_orders_agree_where_both_were_answered_alike():
  assert statistics(ASKED).orders_agree == pytest.approx(4 / 6)


def test_first_slot_wins_are_counted_over_all_answers_that_prefer_a_side():
  assert statistics(ASKED).first_slot_wins == pytest.approx(7 / 10)


def test_longer_wins_only_counts_decided_pairs_of_unequal_length():
  assert statistics(ASKED).longer_wins == 0.5


def test_every_verdict_is_counted():
  found = statistics(ASKED)
  assert found.pairs == 7 and [found.counts[verdict] for verdict in Verdict] == [1, 2, 1, 2, 1]


def test_a_teacher_that_leaves_no_evidence_has_no_shares_of_orders():
  assert statistics([judged(F), judged(T)]).shares() == {"longer_wins": 1.0}
  assert statistics([]).shares() == {}


def test_members_of_an_ensemble_are_told_apart():
  members = [
    {"teacher": "one", "verdict": "first", "evidence": {"answers": [{"slot": "A"}]}},
    {"teacher": "two", "verdict": "error", "evidence": {}},
  ]
  pairs = [Judged("x", "y", I, {"agreement": 0.25, "members": members}), judged(F)]
  assert statistics(pairs).agreement == 0.25
  found = by_member(pairs)
  assert set(found) == {"one", "two"} and [len(each) for each in found.values()] == [1, 1]
  assert statistics(found["one"]).counts[F] == 1 and statistics(found["two"]).counts[E] == 1

"""The ensemble: a failed member never decides a pair, and costs one only if its vote could have mattered."""

import itertools

import pytest

from tsalign_jax.teachers.base import Teacher, Work
from tsalign_jax.teachers.checks import ChecksTeacher
from tsalign_jax.teachers.ensemble import Ensemble, majority, mean
from tsalign_jax.types import CandidatePair, Judgement, Prompt, UserError, Verdict

F, S, T, I, E = Verdict
PAIR = CandidatePair(Prompt(0, [{"role": "user", "content": "Tea?"}]), "Yes.", "No.")


class Fixed(Teacher):
  """Always of one opinion, or in trouble."""

  def __init__(self, identity, judgement):
    self.identity, self.judgement, self.open = identity, judgement, False

  def judge(self, pairs):
    assert self.open
    if isinstance(self.judgement, Exception):
      raise self.judgement
    return [self.judgement] * len(pairs)

  def __enter__(self):
    self.open = True
    return self

  def __exit__(self, *exception):
    self.open = False


class Asked(Fixed):
  """One whose opinions are not called as it is."""

  def __init__(self, identity, opinions):
    super().__init__(identity, Judgement(F))
    self._opinions = opinions

  @property
  def opinions(self):
    return self._opinions


def test_a_member_may_be_any_teacher():
  checks = ChecksTeacher(default=[{"name": "max_words", "limit": 2}])
  with Ensemble([Fixed("one", Judgement(T)), checks], "mean", "teacher") as teacher:
    judged = teacher.judge([PAIR, CandidatePair(PAIR.prompt, "Not for me, thank you.", "No.")])
  assert [each.verdict for each in judged] == [T, S]


MAJORITIES = {
  (F, F, S): F,
  (F, S, S): S,
  (T, T, F): T,
  (F, F, E): F,  # whatever the third would have said
  (F, S, E): E,  # it would have decided
  (F, I, E): E,
  (F, E, E): E,
  (I, I, E): I,  # no vote of its could have made a majority
  (F, S, T): I,
  (F, I, I): I,
  (F, S): I,
  (F, T): I,
  (F, F): F,
  (F, E): E,
  (E, E, E): E,
}


@pytest.mark.parametrize("votes", MAJORITIES, ids=lambda votes: " ".join(votes))
def test_majority_is_more_than_half_of_all_members(votes):
  for order in itertools.permutations(votes):
    assert majority([Judgement(vote) for vote in order])[0] == MAJORITIES[votes]


@pytest.mark.parametrize("vote", [majority, mean])
def test_error_stands_exactly_where_another_vote_of_the_failed_could_change_the_verdict(vote):
  for votes in itertools.product(Verdict, repeat=3):
    judged = [Judgement(each) for each in votes]
    outcomes = {
      vote([Judgement(next(fill)) if each.verdict == E else each for each in judged])[0]
      for fill in map(iter, itertools.product((F, S, T, I), repeat=3))
    }
    assert vote(judged)[0] == (outcomes.pop() if len(outcomes) == 1 else E), votes


MEANS = [
  ([(F, 0.9), (S, 0.3), (S, 0.4)], F, 0.533),
  ([(F, 0.9), (S, 0.0), (I, None)], S, 0.467),
  ([(F, None), (S, None)], T, 0.5),
  ([(F, 0.7), (F, 0.6), (S, 0.2)], T, 0.5),  # whatever the order in which they are added up
  ([(I, 0.95), (S, 0.3)], S, 0.4),  # what contradicts itself decides nothing
  ([(I, 0.95), (T, None)], T, 0.5),
  ([(I, 0.6), (I, 0.6)], I, 0.5),
  ([(I, 0.6), (E, None)], E, None),
  ([(F, 0.9), (F, 0.9), (E, None)], F, 0.9),
  ([(F, 0.7), (F, 0.7), (E, None)], E, None),
  ([(S, 0.1), (S, 0.2), (E, None)], S, 0.15),
]


@pytest.mark.parametrize(("votes", "verdict", "probability"), MEANS)
def test_mean_takes_the_side_on_which_the_probabilities_lie(votes, verdict, probability):
  for order in itertools.permutations(votes):
    found = mean([Judgement(*vote) for vote in order])
    assert found == (verdict, probability and pytest.approx(probability, abs=1e-3))


def test_evidence_holds_every_member_and_their_agreement():
  members = [Fixed("one", Judgement(F, 0.8, {"why": 1})), Fixed("two", Judgement(F)), Fixed("three", Judgement(S))]
  with Ensemble(members, "majority", "teacher") as teacher:
    judgement = teacher.judge([PAIR, PAIR])[1]
  assert judgement.verdict == F and judgement.evidence["agreement"] == pytest.approx(2 / 3)
  assert judgement.evidence["members"][0] == {
    "teacher": "one",
    "verdict": F,
    "probability": 0.8,
    "evidence": {"why": 1},
  }
  assert not any(member.open for member in members)


def test_members_of_one_opinion_are_refused_whatever_they_are_called():
  one, two = Fixed("judge", Judgement(F)), Asked("judge one drawn order", {"judge"})
  with pytest.raises(UserError, match=r"teacher.members: judge is there twice"):
    Ensemble([one, two], "majority", "teacher")


def test_it_waits_for_a_network_where_a_member_does():
  here, far = Fixed("here", Judgement(F)), Fixed("far", Judgement(F))
  assert not Ensemble([here, Fixed("there", Judgement(F))], "mean", "teacher").remote
  far.remote = True
  assert Ensemble([here, far], "mean", "teacher").remote


def test_where_all_fail_nobody_agrees():
  with Ensemble([Fixed("one", Judgement(E)), Fixed("two", Judgement(E))], "majority", "teacher") as teacher:
    judgement = teacher.judge([PAIR])[0]
  assert judgement.verdict == E and "agreement" not in judgement.evidence and len(judgement.evidence["members"]) == 2


def test_members_behind_a_network_are_asked_before_those_here_work():
  order = []

  class Noting(Fixed):
    def submit(self, pairs):
      order.append(self.identity)
      return super().submit(pairs)

  members = [Noting("here", Judgement(F)), Noting("far", Judgement(S)), Noting("also here", Judgement(F))]
  members[1].remote = True
  with Ensemble(members, "majority", "teacher") as teacher:
    judgement = teacher.judge([PAIR])[0]
  assert order == ["far", "here", "also here"]
  assert [member["teacher"] for member in judgement.evidence["members"]] == ["here", "far", "also here"]


def test_trouble_of_a_member_reaches_the_caller_and_everything_is_closed():
  members = [Fixed("one", Judgement(F)), Fixed("two", UserError("two: out of money"))]
  with pytest.raises(UserError, match="two: out of money"), Ensemble(members, "mean", "teacher") as teacher:
    teacher.judge([PAIR])
  assert not any(member.open for member in members)


def test_identity_depends_on_members_and_vote():
  one, two, three = (Fixed(name, None) for name in ("one", "two", "three"))
  names = {Ensemble(*arguments, "teacher").identity for arguments in [([one, two], "mean"), ([one, two], "majority")]}
  assert len(names | {Ensemble([one, three], "mean", "teacher").identity}) == 3


def test_the_same_member_twice_is_refused():
  with pytest.raises(UserError, match=r"teacher.members: one is there twice"):
    Ensemble([Fixed("one", None), Fixed("one", None)], "mean", "teacher")


def test_only_members_behind_a_network_begin_ahead_and_the_slowest_sets_the_pace():
  class Remote(Fixed):
    def __init__(self, identity, work):
      super().__init__(identity, Judgement(F))
      self.work = work

    def ahead(self, pairs):
      return [self.submit(pairs)]

    def worked(self):
      return self.work

  local, quick, slow = Fixed("local", Judgement(S)), Remote("quick", Work(9, 1.0)), Remote("slow", Work(9, 3.0))
  with Ensemble([local, quick, slow], "majority", "teacher") as ensemble:
    assert [future.result() for future in ensemble.ahead([PAIR])] == [[quick.judgement], [slow.judgement]]
    assert ensemble.worked() == slow.work
  with Ensemble([local, Fixed("other", Judgement(F))], "majority", "teacher") as ensemble:
    assert ensemble.ahead([PAIR]) == [] and ensemble.worked() is None

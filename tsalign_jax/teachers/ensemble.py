"""The `ensemble` teacher: several teachers vote on each pair.

An abstention is a vote for neither side. A member that failed could have voted anything: the ensemble has a verdict
only if no vote of the failed members could change it, and is an ERROR otherwise. So a failure never decides a pair,
and no pair is lost to a failure that could not have decided it.
"""

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Self

from tsalign_jax.teachers.base import Teacher, Work
from tsalign_jax.types import CandidatePair, Judgement, Prompt, UserError, Verdict

POINTS = {Verdict.FIRST: 1.0, Verdict.TIE: 0.5, Verdict.SECOND: 0.0, Verdict.INCONSISTENT: 0.5}
DECIDED = (Verdict.FIRST, Verdict.SECOND, Verdict.TIE)


class Ensemble(Teacher):
  """Asks all members about every pair, those behind a network at the same time."""

  def __init__(self, members: Sequence[Teacher], vote: Literal["majority", "mean"], where: str):
    names = [member.identity for member in members]
    opinions = Counter(opinion for member in members for opinion in member.opinions)
    for opinion, count in opinions.items():
      if count > 1:
        raise UserError(f"{where}.members: {opinion} is there twice, and would only repeat itself; remove one")
    self._members, self._vote = members, majority if vote == "majority" else mean
    digest = hashlib.sha256(json.dumps([vote, names]).encode()).hexdigest()[:16]
    self.identity = f"ensemble {vote} of {len(members)} {digest}"

  @property
  def remote(self) -> bool:
    """Whether any member waits for a network."""
    return any(member.remote for member in self._members)

  @property
  def opinions(self) -> Set[str]:
    """Those of the members."""
    return {opinion for member in self._members for opinion in member.opinions}

  def validate_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
    """Raises UserError that names the first row which a member could not judge."""
    for member in self._members:
      member.validate_prompts(prompts, source)

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. Evidence: each member's judgement, and the share that gave the verdict."""
    return self.submit(pairs).result()

  def submit(self, pairs: Sequence[CandidatePair]) -> Future[list[Judgement]]:
    """The judgements, in the future."""
    # Members here work before `submit` returns, so those behind a network are asked before them.
    asked = {member: member.submit(pairs) for member in sorted(self._members, key=lambda member: not member.remote)}
    return self._waiting.submit(lambda: self._votes([asked[member].result() for member in self._members]))

  def ahead(self, pairs: Sequence[CandidatePair]) -> list[Future]:
    """Begins with members behind a network."""
    return [future for member in self._members for future in member.ahead(pairs)]

  def worked(self) -> Work | None:
    """The work of the member that took longest, of those that know theirs: of those behind a network, if there are any.

    Only these work ahead, and what is counted then must be theirs later too.
    """
    members = [member for member in self._members if member.remote] or self._members
    known = [work for member in members if (work := member.worked())]
    return max(known, key=lambda work: work.seconds, default=None)

  def note(self) -> str:
    """What the members have to note."""
    return "; ".join(filter(None, (member.note() for member in self._members)))

  def __enter__(self) -> Self:
    with contextlib.ExitStack() as opened:
      self._waiting = opened.enter_context(ThreadPoolExecutor(1, "ensemble"))
      for member in self._members:
        opened.enter_context(member)
      self._opened = opened.pop_all()
    return self

  def __exit__(self, *exception: object) -> None:
    self._opened.__exit__(*exception)

  def _votes(self, judged: Sequence[Sequence[Judgement]]) -> list[Judgement]:
    return [self._pair(judgements) for judgements in zip(*judged, strict=True)]

  def _pair(self, judgements: Sequence[Judgement]) -> Judgement:
    verdict, probability = self._vote(judgements)
    members = [
      {"teacher": member.identity, "verdict": each.verdict, "probability": each.probability, "evidence": each.evidence}
      for member, each in zip(self._members, judgements, strict=True)
    ]
    if verdict == Verdict.ERROR:
      return Judgement(verdict, probability, {"members": members})
    agreement = sum(each.verdict == verdict for each in judgements) / len(judgements)
    return Judgement(verdict, probability, {"agreement": agreement, "members": members})


def majority(judgements: Sequence[Judgement]) -> tuple[Verdict, float | None]:
  """The verdict of more than half of the members; INCONSISTENT where there is none, ERROR where failures hide it.

  The probability is the mean over the members that answered.
  """
  votes = Counter(each.verdict for each in judgements)
  probability, half = _mean(judgements), len(judgements) / 2
  for verdict in DECIDED:
    if votes[verdict] > half:
      return verdict, probability
  hidden = any(votes[verdict] + votes[Verdict.ERROR] > half for verdict in DECIDED)
  return (Verdict.ERROR, None) if votes[Verdict.ERROR] and hidden else (Verdict.INCONSISTENT, probability)


def mean(judgements: Sequence[Judgement]) -> tuple[Verdict, float | None]:
  """The side of 0.5 on which the mean probability lies, wherever between 0 and 1 the failed members' would be.

  A member without a probability counts as 1, 0.5 or 0; one that contradicts itself counts as 0.5, whatever its
  probability. Where all members contradict themselves, so does the ensemble.
  """
  failed = sum(each.verdict == Verdict.ERROR for each in judgements)
  undecided = sum(each.verdict == Verdict.INCONSISTENT for each in judgements)
  if undecided + failed == len(judgements):
    return (Verdict.ERROR, None) if failed else (Verdict.INCONSISTENT, 0.5)
  least = math.fsum(_probability(each) for each in judgements if each.verdict != Verdict.ERROR) / len(judgements)
  most = least + failed / len(judgements)
  if least > 0.5:
    return Verdict.FIRST, _mean(judgements)
  if most < 0.5:
    return Verdict.SECOND, _mean(judgements)
  return (Verdict.ERROR, None) if failed else (Verdict.TIE, 0.5)


def _mean(judgements: Sequence[Judgement]) -> float | None:
  known = [_probability(each) for each in judgements if each.verdict != Verdict.ERROR]
  return math.fsum(known) / len(known) if known else None


def _probability(judgement: Judgement) -> float:
  unknown = judgement.probability is None or judgement.verdict == Verdict.INCONSISTENT
  return POINTS[judgement.verdict] if unknown else judgement.probability

"""How good a teacher's verdicts look from outside: pure functions of verdicts, evidence and texts."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tsalign_jax.nested import walk
from tsalign_jax.types import Judgement, UserError, Verdict

CONSISTENT = ({"A", "B"}, {"C"})  # slots of the better response in both orders, where the teacher stays of one mind


class Judged(NamedTuple):
  """A pair with its verdict, and the evidence that the teacher left."""

  first: str
  second: str
  verdict: Verdict
  evidence: dict[str, Any]


def check_answered(judged: Sequence[Judged | Judgement], who: str) -> None:
  """Raises UserError where a teacher failed with every pair: that says nothing, and must not be taken for a result."""
  if judged and all(each.verdict == Verdict.ERROR for each in judged):
    reasons = (part for name, part in walk(judged[0].evidence) if name == "failure")
    reason = next(reasons, "it does not say why")
    raise UserError(f"{who} failed with every pair ({reason}); run the same command to ask again")


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Counts by verdict, and shares between 0 and 1; None where the teacher leaves nothing to tell it from."""

  counts: Counter[Verdict]
  orders_agree: float | None
  """Pairs asked in both orders, and answered in both, of which the two answers agree."""
  first_slot_wins: float | None
  """Answers that name a better response, of which it was the one shown first; one half in both orders is fair."""
  longer_wins: float | None
  """Decided pairs of unequal length (in characters), of which the longer response won."""
  agreement: float | None
  """Share of an ensemble's members that gave its verdict, on average."""

  @property
  def pairs(self) -> int:
    """How many pairs were judged."""
    return self.counts.total()

  def shares(self) -> dict[str, float]:
    """Those of the shares that there are, by name."""
    names = ("orders_agree", "first_slot_wins", "longer_wins", "agreement")
    return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def statistics(judged: Iterable[Judged]) -> Statistics:
  """The statistics of these verdicts."""
  judged = list(judged)
  slots = [_slots(each.evidence) for each in judged]
  both = [pair for pair in slots if len(pair) == 2 and None not in pair]
  sides = [slot for pair in slots for slot in pair if slot in ("A", "B")]
  decided = [each for each in judged if each.verdict in (Verdict.FIRST, Verdict.SECOND)]
  unequal = [each for each in decided if len(each.first) != len(each.second)]
  agreement = [each.evidence["agreement"] for each in judged if "agreement" in each.evidence]
  return Statistics(
    counts=Counter(each.verdict for each in judged),
    orders_agree=_mean([set(pair) in CONSISTENT for pair in both]),
    first_slot_wins=_mean([slot == "A" for slot in sides]),
    longer_wins=_mean([(len(each.first) > len(each.second)) == (each.verdict == Verdict.FIRST) for each in unequal]),
    agreement=_mean(agreement),
  )


def by_member(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
  """The verdicts of each member, by its name, where an ensemble judged; nothing where it did not."""
  members: dict[str, list[Judged]] = {}
  for each in judged:
    for member in each.evidence.get("members", ()):
      theirs = each._replace(verdict=Verdict(member["verdict"]), evidence=member["evidence"])
      members.setdefault(member["teacher"], []).append(theirs)
  return members


def _slots(evidence: dict[str, Any]) -> list[str | None]:
  """The better response's slot in the answer to each order: A, B, C for neither, None without an answer."""
  return [answer.get("slot") for answer in evidence.get("answers", ())]


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None

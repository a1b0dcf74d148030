"""What every teacher is: a function from candidate pairs to judgements, in batches."""

from collections.abc import Sequence
from typing import Protocol

from tsalign_jax.types import CandidatePair, Judgement


class Teacher(Protocol):
  """Judges candidate pairs. `identity` names the teacher and everything that its verdicts depend on."""

  identity: str

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. A pair that cannot be judged is an ERROR, never a guess."""
    ...

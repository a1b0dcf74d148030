"""What every teacher is: a function from candidate pairs to judgements, in batches."""

from collections.abc import Sequence
from typing import Protocol

from tsalign_jax.types import CandidatePair, Judgement, Prompt


class Teacher(Protocol):
  """Judges candidate pairs. `identity` names the teacher and everything that its verdicts depend on."""

  identity: str

  def validate_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
    """Raises UserError that names the first row of `source` which this teacher could not judge."""
    ...

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. A pair that cannot be judged is an ERROR, never a guess."""
    ...

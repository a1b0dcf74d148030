"""What every teacher is: a function from candidate pairs to judgements, in batches."""

from collections.abc import Sequence, Set
from concurrent.futures import Future
from typing import NamedTuple, Protocol, Self

from tsalign_jax.types import CandidatePair, Judgement, Prompt


class Work(NamedTuple):
  """What a teacher has judged since it was opened, and for how long it was at work: not what was stored before."""

  pairs: float
  seconds: float


class Teacher(Protocol):
  """Judges candidate pairs. `identity` names the teacher and everything that its verdicts depend on.

  Whoever asks for judgements opens the teacher first (`with teacher: ...`); validating needs no opening. A class that
  inherits gets what a teacher without a network or files of its own need not care about.
  """

  identity: str
  remote = False  # whether it waits for a network

  @property
  def opinions(self) -> Set[str]:
    """Whose opinions the verdicts are: another teacher that shares one of them is no independent judge."""
    return {self.identity}

  def validate_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
    """Raises UserError that names the first row of `source` which this teacher could not judge."""
    ...

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. A pair that cannot be judged is an ERROR, never a guess."""
    ...

  def submit(self, pairs: Sequence[CandidatePair]) -> Future[list[Judgement]]:
    """The judgements of `judge`, later: a teacher that waits for a network does so while the caller goes on."""
    future: Future[list[Judgement]] = Future()
    future.set_result(self.judge(pairs))
    return future

  def ahead(self, pairs: Sequence[CandidatePair]) -> list[Future]:
    """Begins with pairs that it will be asked to judge later, if that spares waiting for a network then.

    The futures end when this has been done, and raise UserError where judging has to stop.
    """
    return []

  def worked(self) -> Work | None:
    """What it has judged; None of a teacher whose speed shows from outside."""
    return None

  def scores(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[float]] | None:
    """The score of each response to each prompt, the higher the better; None from a teacher that only compares."""
    return None

  def note(self) -> str:
    """What is worth showing beside the progress of judging, such as the cost so far; may be empty."""
    return ""

  def __enter__(self) -> Self:
    """Opens what judging needs."""
    return self

  def __exit__(self, *exception: object) -> None:
    """Lets requests under way finish, so that nothing paid for is lost, and closes."""

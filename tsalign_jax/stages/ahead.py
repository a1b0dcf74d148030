"""Judging ahead: a teacher behind a network is asked about complete prompts while others are still being sampled.

Its answers go into the verdict store, where the stage `judge` finds them. So nothing that a run writes depends on how
far this came, and no answer is paid for twice; a question whose answers could not be read is asked again by `judge`.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future

from tsalign_jax.data.tables import Rows, by_prompt, to_prompt
from tsalign_jax.models.functional import Params
from tsalign_jax.scoring.reward import RewardEngine, build_reward_engine
from tsalign_jax.stages.base import Job
from tsalign_jax.stages.mine import candidates
from tsalign_jax.stages.score import scored
from tsalign_jax.teachers.base import Teacher, Work
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.types import CandidatePair

ENOUGH = 64  # prompts that are scored together: batches of fewer would be of shapes that nothing else has use for


class Ahead:
  """Has a teacher asked about the pairs that `mine` will make of the responses that it is told of."""

  def __init__(self, job: Job, prompts: Mapping[int, dict], teacher: Teacher):
    self._job, self._prompts, self._teacher = job, prompts, teacher
    self._waiting: dict[int, Rows] = {}
    self._asked: list[Future] = []

  def tell(self, rows: Rows) -> None:
    """All responses of some prompts. Raises UserError where judging has to stop; what is sampled is on disk by then."""
    self._raise_what_failed()
    self._waiting |= by_prompt(rows)
    if len(self._waiting) >= (ENOUGH if "student" in self._job.reads else 1):
      self._ask()

  def note(self) -> str:
    """What the teacher has to note."""
    return self._teacher.note()

  def worked(self) -> Work | None:
    """What the teacher has done so far."""
    return self._teacher.worked()

  def _raise_what_failed(self) -> None:
    done = [future for future in self._asked if future.done()]
    self._asked = [future for future in self._asked if future not in done]
    for future in done:
      future.result()

  def _ask(self) -> None:
    responses, self._waiting = self._waiting, {}
    scores = self._scores(responses) if "student" in self._job.reads else {}
    settings = (self._job.config.mining, self._job.options["mining"], self._job.seed_of("mine"))
    pairs = []
    for i, rows in responses.items():
      texts = {row["response_id"]: row["text"] for row in rows}
      for row in candidates(*settings, i, rows, scores.get(i)):
        if row["dropped"] is None:
          pairs.append(CandidatePair(to_prompt(self._prompts[i]), texts[row["first"]], texts[row["second"]]))
    self._asked += self._teacher.ahead(pairs)

  def _scores(self, responses: dict[int, Rows]) -> dict[int, Rows]:
    prompts = {i: self._prompts[i]["prompt"] for i in responses}
    found = scored(*self._student, prompts, responses)
    return {rows[0]["prompt_id"]: rows for rows, _ in found}

  @functools.cached_property
  def _student(self) -> tuple[RewardEngine, Params]:
    model = self._job.student()
    engine = build_reward_engine(model, self._job.mesh, self._job.config.student)
    return engine, self._job.load(model, self._job.reads["student"])


@contextlib.contextmanager
def judging_ahead(job: Job, prompts: Mapping[int, dict]) -> Iterator[Ahead | None]:
  """What to tell which of these prompts, rows of their table by id, are complete; None where there is nothing to spare.

  That is so in a stage without candidates, and with a teacher that waits for no network. Requests that are not under
  way by the end are left to `judge`.
  """
  if "mining" not in job.options:
    yield None
    return
  with build_teacher(job.config) as teacher:
    yield Ahead(job, prompts, teacher)

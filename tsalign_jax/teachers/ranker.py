"""The `ranker` teacher: a black-box language model orders n responses, shown by examples how it is done.

This is the ranking by in-context learning of CycleAlign (arXiv 2310.16271): static demonstrations come with the
configuration, dynamic ones with each list of responses. The wording, and that static ones stand first, is ours.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsalign_jax.config import RankerTeacher
from tsalign_jax.data.files import conversation, read_rows
from tsalign_jax.teachers.asking import Failure, Question
from tsalign_jax.teachers.chat import Clock, Reply
from tsalign_jax.teachers.chat_teacher import ChatTeacher, incomplete
from tsalign_jax.teachers.parse import read_ranking, shortened, without_thoughts
from tsalign_jax.teachers.store import Answer
from tsalign_jax.teachers.templates import load_template
from tsalign_jax.types import CandidateList, Demonstration, Prompt, Ranking, UserError

SLOTS = {"1 > 2": "A", "2 > 1": "B"}
TEA = [{"role": "user", "content": "Tea?"}]
SAMPLE = {
  "prompt": TEA,
  "responses": ["Yes.", "No."],
  "demonstrations": [{"prompt": TEA, "responses": ["Yes.", "No."], "ranking": [2, 1]}],
}


class Ranker(ChatTeacher):
  """Asks for the order of any number of responses; a pair is a list of two."""

  def __init__(self, settings: RankerTeacher, run: Path, where: str, clock: Clock):
    self._template = load_template(settings.template, f"{where}.template", answers=["ranking"], sample=SAMPLE)
    file = settings.demonstrations
    self._static = [_shown(each) for each in read_demonstrations(file)] if file else []
    digest = hashlib.sha256(json.dumps(self._static, sort_keys=True).encode()).hexdigest()
    content = {"template": self._template.digest, "demonstrations": digest}
    super().__init__("ranker", settings, content, run, where, clock)

  def rank(self, prompt: Prompt, responses: Sequence[str], demonstrations: Sequence[Demonstration] = ()) -> Ranking:
    """The order of the responses to one prompt, asked in the order given; None in it if that failed."""
    return self.rank_lists([CandidateList(prompt, responses, demonstrations)])[0]

  def rank_lists(self, lists: Sequence[CandidateList]) -> list[Ranking]:
    """One ranking for each list, in order; the lists are asked about at once."""
    return self._asker.run(self._rank(lists)).result()

  def question(self, prompt: Prompt, first: str, second: str) -> Question:
    """Which of two responses comes first."""
    return self._question(CandidateList(prompt, [first, second]))

  def slot(self, answer: Answer) -> str:
    """The response that the ranking of a pair puts first."""
    return SLOTS[answer.reading]

  async def _rank(self, lists: Sequence[CandidateList]) -> list[Ranking]:
    answers = await self._asker.ask([self._question(each) for each in lists])
    return [_ranking(answer) for answer in answers]

  def _question(self, candidates: CandidateList) -> Question:
    demonstrations = [*self._static, *(_shown(each) for each in candidates.demonstrations)]
    prompt, responses = candidates.prompt.messages, list(candidates.responses)
    messages = self._template.fill(prompt=prompt, responses=responses, demonstrations=demonstrations)

    def read(reply: Reply) -> Answer | str:
      if missing := incomplete(reply):
        return missing
      text = without_thoughts(reply.text).strip()
      order = read_ranking(text, len(responses))
      if order is None:
        return f"the answer is not a ranking of {len(responses)} responses: {shortened(text)}"
      return Answer(" > ".join(str(index + 1) for index in order), None, reply.text)

    return Question(messages, prompt[-1]["content"], read)


def read_demonstrations(source: str) -> list[Demonstration]:
  """The demonstrations in a file: rows of a prompt, its responses, and their numbers from 1, best first.

  Raises UserError that names the row and the fix.
  """
  found = [_demonstration(row, f"{source}: row {index + 1}") for index, row in enumerate(read_rows(source))]
  if not found:
    raise UserError(f"{source}: there is no row in it")
  return found


def _demonstration(row: dict[str, Any], where: str) -> Demonstration:
  responses, ranking = row.get("responses"), row.get("ranking")
  if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(text, str) for text in responses):
    raise UserError(f"{where}: `responses` is a list of two texts or more, this one is {responses!r}")
  if not isinstance(ranking, list) or sorted(map(str, ranking)) != sorted(map(str, range(1, len(responses) + 1))):
    raise UserError(
      f"{where}: `ranking` holds each number from 1 to {len(responses)} once, best first; this one is {ranking!r}"
    )
  prompt = conversation(row.get("prompt"), where)
  return Demonstration(prompt, responses, [int(number) - 1 for number in ranking])


def _shown(example: Demonstration) -> dict[str, Any]:
  """A demonstration as templates show it: numbers from 1."""
  return {
    "prompt": example.prompt,
    "responses": list(example.responses),
    "ranking": [index + 1 for index in example.order],
  }


def _ranking(answer: Answer | Failure) -> Ranking:
  if isinstance(answer, Failure):
    return Ranking(None, {"failure": answer.reason})
  return Ranking(tuple(int(number) - 1 for number in answer.reading.split(" > ")), {"text": answer.text})

"""What teachers behind a chat endpoint share: asking about a pair in both orders, and what the answers add up to."""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Sequence, Set
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from tsalign_jax.config import ChatTeacher as Settings
from tsalign_jax.teachers.asking import Asker, Failure, Question
from tsalign_jax.teachers.base import Teacher, Work
from tsalign_jax.teachers.chat import Clock, Reply
from tsalign_jax.teachers.parse import shortened, without_thoughts
from tsalign_jax.teachers.store import Answer
from tsalign_jax.types import CandidatePair, Judgement, Prompt, Verdict

RULES = 2  # to be raised when answers are read by other rules, so that those read before are not taken for new ones
AS_SHOWN = {"A": Verdict.FIRST, "B": Verdict.SECOND, "C": Verdict.TIE}
SWAPPED = {"A": Verdict.SECOND, "B": Verdict.FIRST, "C": Verdict.TIE}


class ChatTeacher(Teacher):
  """A teacher that asks a language model. A subclass says what it asks about two responses in an order.

  Answers are stored under the name of who gives them, without the number of orders: one that was given when a run
  asked in one order serves another run that asks in both.
  """

  remote = True

  def __init__(self, kind: str, settings: Settings, content: dict[str, Any], run: Path, where: str, clock: Clock):
    """`content` is whatever the answers depend on beyond model and sampling; `where` the key in the configuration."""
    names = ("model", "extra_body", "temperature", "max_tokens")
    depends = {**content, "rules": RULES, **{name: getattr(settings, name) for name in names}}
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    answerer = f"{kind} {settings.model} {digest}"
    self.identity = answerer if settings.both_orders else f"{answerer} one drawn order"
    self._answerer, self._both_orders = answerer, settings.both_orders
    self._asker = Asker(answerer, settings, run, where, clock)

  @property
  def opinions(self) -> Set[str]:
    """Those of who answers, in however many orders."""
    return {self._answerer}

  @abc.abstractmethod
  def question(self, prompt: Prompt, first: str, second: str) -> Question:
    """What is asked about two responses."""

  def slot(self, answer: Answer) -> str:
    """Which of the two the answer prefers: A (shown first), B or C (neither)."""
    return answer.reading

  def validate_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
    """None: a language model can be asked about any prompt."""

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. Raises UserError when judging has to stop; answers are kept."""
    return self.submit(pairs).result()

  def submit(self, pairs: Sequence[CandidatePair]) -> Future[list[Judgement]]:
    """The judgements, in the future: requests go out at once."""
    return self._asker.run(self._judge(pairs))

  def ahead(self, pairs: Sequence[CandidatePair]) -> list[Future]:
    """Asks at once; the answers are in the store when `judge` is called with the same pairs."""
    return [self.submit(pairs)]

  def worked(self) -> Work:
    """Pairs that were answered, not counting what was stored before, and how long requests were under way."""
    answered, seconds = self._asker.worked()
    return Work(answered / (2 if self._both_orders else 1), seconds)

  def note(self) -> str:
    """Tokens and cost of this run so far."""
    return self._asker.note()

  def __enter__(self) -> Self:
    self._asker.open()
    return self

  def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
    # Someone who presses Ctrl-C does not want to wait for a server.
    self._asker.close(at_once=kind is not None and issubclass(kind, KeyboardInterrupt))

  async def _judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    orders = [self._orders(pair) for pair in pairs]
    questions = [
      self.question(pair.prompt, *((pair.second, pair.first) if swapped else (pair.first, pair.second)))
      for pair, asked in zip(pairs, orders, strict=True)
      for swapped in asked
    ]
    answers = iter(await self._asker.ask(questions))
    return [
      add_up([(swapped, self._opinion(next(answers))) for swapped in asked]) if asked else EQUAL for asked in orders
    ]

  def _opinion(self, answer: Answer | Failure) -> Answer | Failure:
    return answer if isinstance(answer, Failure) else dataclasses.replace(answer, reading=self.slot(answer))

  def _orders(self, pair: CandidatePair) -> list[bool]:
    """Whether the pair is swapped, for each time that it is asked about.

    Where that is once, the texts themselves decide: otherwise the side that always stands first, such as the aligned
    policy, would profit from a liking for slot A.
    """
    if pair.first == pair.second:
      return []
    return [False, True] if self._both_orders else [_draw(pair.prompt, pair.first) > _draw(pair.prompt, pair.second)]


def _draw(prompt: Prompt, text: str) -> bytes:
  return hashlib.sha256(json.dumps([prompt.messages, text]).encode()).digest()


def incomplete(reply: Reply) -> str | None:
  """Why a reply holds no whole answer, in words; None if it does."""
  if reply.finish == "length":
    return f"the answer was cut off by max_tokens: {shortened(reply.text)}"
  if reply.finish == "content_filter":
    return "the answer was withheld by a content filter"
  if "<think>" in without_thoughts(reply.text):
    return f"the answer ends in the middle of its thoughts: {shortened(reply.text)}"
  return None


EQUAL = Judgement(Verdict.TIE, 0.5, {"equal": True})  # equal responses need no opinion


def add_up(answers: Sequence[tuple[bool, Answer | Failure]]) -> Judgement:
  """The judgement of a pair from answers (A, B or C), each with whether it was to the pair swapped.

  A missing answer makes an ERROR. Two answers that disagree, also a side against a tie, make it INCONSISTENT. The
  probability, where answers have one, is the mean over the orders, in which a preference for a slot cancels out.
  """
  evidence = {"answers": [_evidence(answer) for _, answer in answers]}
  if any(isinstance(answer, Failure) for _, answer in answers):
    return Judgement(Verdict.ERROR, None, evidence)
  verdicts = {(SWAPPED if swapped else AS_SHOWN)[answer.reading] for swapped, answer in answers}
  known = [(swapped, answer.probability) for swapped, answer in answers if answer.probability is not None]
  for_first = [1 - p if swapped else p for swapped, p in known]
  probability = sum(for_first) / len(answers) if len(known) == len(answers) else None
  return Judgement(verdicts.pop() if len(verdicts) == 1 else Verdict.INCONSISTENT, probability, evidence)


def _evidence(answer: Answer | Failure) -> dict[str, Any]:
  if isinstance(answer, Failure):
    return {"failure": answer.reason}
  known = {} if answer.probability is None else {"probability": answer.probability}
  return {"slot": answer.reading, **known, "text": answer.text}

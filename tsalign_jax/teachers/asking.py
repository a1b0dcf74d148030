"""Asks many questions of one endpoint: at once, within limits, and so that nothing is paid for twice or lost.

A question goes through

    in the store?  ->  a slot among `concurrency`  ->  room in the budget, at its worst  ->  the request
    ->  readable: into the store, then into the ledger, then to whoever asked
    ->  unreadable: asked again, `reasks` times
    ->  429, 408, 5xx, time-out, dropped connection, nobody there: waits and is sent again, `retries` times
    ->  any other 4xx, no room in the budget, too many failures: everything stops

When everything stops, requests under way are still waited for, since they are paid for.
"""

import asyncio
import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tsalign_jax.config import ChatTeacher
from tsalign_jax.nested import walk
from tsalign_jax.teachers import ledger
from tsalign_jax.teachers.backoff import delay
from tsalign_jax.teachers.chat import ChatClient, Clock, Reply, Trouble
from tsalign_jax.teachers.ledger import UNKNOWN_COST, Ledger, Outcome, OverBudget, cost_of, worst_cost
from tsalign_jax.teachers.parse import shortened
from tsalign_jax.teachers.store import STORE, Answer, Price, VerdictStore
from tsalign_jax.types import Conversation, UserError

FEW = 40  # questions: among fewer, one failure would be a large share

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked, and how a reply is read: an `Answer`, or in words why it cannot be read."""

  messages: Conversation
  about: str  # the prompt, as a person would find it again
  read: Callable[[Reply], Answer | str]
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the request, beside the usual ones


@dataclasses.dataclass(frozen=True)
class Failure:
  """A question that got no readable answer, and why."""

  reason: str


class Asker:
  """Asks questions in the name of a teacher. Opened, it has an event loop in a thread of its own for all its work."""

  def __init__(self, identity: str, settings: ChatTeacher, run: Path, where: str, clock: Clock):
    """`where` is the teacher's key in the configuration, for messages about it."""
    self._identity, self._settings, self._endpoint = identity, settings, settings.endpoint
    self._run, self._where, self._clock = run, where, clock
    self._client = ChatClient(settings.endpoint, where, clock)
    if any(self._client.key_is_in(str(part)) for each in walk(settings.model_dump(mode="json")) for part in each):
      raise UserError(f"{where}: holds the key itself, which belongs in the environment alone; take it out")

  def open(self) -> None:
    """Opens the store and the ledger, and starts the thread."""
    files = self._settings.store or self._run / STORE, self._run / ledger.FILE
    self._store, self._files = VerdictStore(files[0]), " and ".join(map(str, files))
    self._ledger = Ledger(files[1], self._identity, self._endpoint.budget, self._clock.now)
    self._slots = asyncio.Semaphore(self._endpoint.concurrency)
    self._pending: dict[str, asyncio.Task] = {}  # a question that is asked twice at the same time is asked once
    self._sending: set[asyncio.Task] = set()
    self._asked = self._failed = self._answered = 0
    self._busy = self._since = 0.0  # seconds with requests under way; when the first of those that are went out
    self._stopped: UserError | None = None
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name=self._identity, daemon=True)
    self._thread.start()

  def close(self, *, at_once: bool = False) -> None:
    """Ends the thread, after the requests under way unless that must be at once, and closes the files."""
    self.run(self._finish(at_once)).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()
    self._ledger.close()
    self._store.close()

  def run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """The future result of work on this asker's event loop, where `ask` is to be called."""
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  async def ask(self, questions: Sequence[Question]) -> list[Answer | Failure]:
    """An answer or a failure for each question, in order. Raises UserError when judging has to stop."""
    try:
      return await asyncio.gather(*map(self._task, questions))
    except UserError:
      await self._drain(self._sending)
      raise
    except asyncio.CancelledError:
      if self._stopped:  # of a question that was ended before it began
        raise self._stopped from None
      raise

  def worked(self) -> tuple[int, float]:
    """Questions answered by the server since this was opened, and the seconds in which requests were under way."""
    return self._answered, self._busy + (self._clock.now() - self._since if self._sending else 0.0)

  def note(self) -> str:
    """Tokens and cost of this run so far, in a few words."""
    prices = self._endpoint.input_price or self._endpoint.output_price
    return f"{self._ledger.tokens:,.0f} tokens" + (f", cost {self._ledger.spent:.2f}" if prices else "")

  def _task(self, question: Question) -> asyncio.Task:
    key = self._key(question)
    if key not in self._pending:
      self._pending[key] = asyncio.create_task(self._answer(key, question))
      self._pending[key].add_done_callback(lambda _: self._pending.pop(key))
    return self._pending[key]

  def _key(self, question: Question) -> str:
    """The identity covers model, template and sampling; the messages are the template with prompt and responses."""
    return hashlib.sha256(json.dumps([self._identity, question.messages], sort_keys=True).encode()).hexdigest()

  async def _answer(self, key: str, question: Question) -> Answer | Failure:
    try:
      return self._store.get(key) or await self._buy(key, question)
    except asyncio.CancelledError:
      if self._stopped:  # whoever waits for this one hears why
        raise self._stopped from None
      raise
    except sqlite3.Error as error:
      self._stop(
        f"{self._where}: answers cannot be stored ({error}); every answer so far is kept: make room for {self._files} "
        "and run the same command again"
      )

  async def _buy(self, key: str, question: Question) -> Answer | Failure:
    async with self._slots:
      self._asked += 1
      unreadable = retries = 0
      while True:
        if self._stopped:
          raise self._stopped
        result = await self._attempt(key, question)
        if isinstance(result, Answer):
          return result
        if result.outcome == Outcome.REFUSED:
          self._stop(
            f"{self._where}: {self._endpoint.base_url} refused a request ({result.message}), about the prompt "
            f"{shortened(question.about)}; every answer so far is kept: mend it there and run the same command again"
          )
        if result.outcome == Outcome.MALFORMED:
          unreadable += 1
          if unreadable > self._endpoint.reasks:
            return self._fail(result.message)
          continue
        retries += 1
        wait = delay(self._endpoint.backoff, self._endpoint.max_wait, retries, result.wait, key)
        if retries > self._endpoint.retries or (result.wait or 0) > self._endpoint.max_wait:
          return self._fail(result.message)
        if self._stopped:
          raise self._stopped
        await self._clock.sleep(wait)

  async def _attempt(self, key: str, question: Question) -> Answer | Trouble:
    """One request. A readable answer is in the store before the ledger knows what it cost, and only then returned."""
    worst = worst_cost(question.messages, self._settings)
    number = await self._reserve(key, worst)
    try:
      return await self._bought(number, key, question, worst)
    finally:
      self._ledger.abandon(number)  # where it was not settled, so that no other request waits for its end

  async def _bought(self, number: int, key: str, question: Question, worst: float) -> Answer | Trouble:
    reply = await self._send(question)
    if isinstance(reply, Trouble):
      unknown = reply.outcome in (*UNKNOWN_COST, Outcome.MALFORMED)
      self._ledger.settle(number, reply.outcome, Price(None, None, worst if unknown else 0.0))
      return reply
    price, answer = self._price(reply, worst), question.read(reply)
    if isinstance(answer, Answer):
      answer = self._store.put(key, self._identity, answer, price, reply.model, self._clock.now())
      self._answered += 1
    self._ledger.settle(number, Outcome.ANSWERED if isinstance(answer, Answer) else Outcome.MALFORMED, price)
    if self._endpoint.budget is not None and price.cost > worst:
      over_limit = price.output_tokens > self._settings.max_tokens
      field, fix = ("limit_field", "try the other field") if over_limit else ("budget", "set null to go on without one")
      self._stop(
        f"{self._where}.endpoint.{field}: {self._endpoint.base_url} used more tokens ({price.input_tokens} + "
        f"{price.output_tokens}) than the request allowed, so that no budget can be kept; {fix}"
      )
    return answer if isinstance(answer, Answer) else Trouble(Outcome.MALFORMED, answer)

  async def _reserve(self, key: str, worst: float) -> int:
    try:
      return await self._ledger.reserve(key, worst)
    except OverBudget:
      self._stop(
        f"{self._where}.endpoint.budget: {self._endpoint.budget:g} could be exceeded by the next request "
        f"({self._ledger.spent:.4g} is spent); every answer so far is kept: raise it and run the same command again"
      )

  async def _send(self, question: Question) -> Reply | Trouble:
    task = asyncio.current_task()
    if not self._sending:
      self._since = self._clock.now()
    self._sending.add(task)
    try:
      return await self._client.send(request_body(self._settings, question))
    finally:
      self._sending.discard(task)
      if not self._sending:
        self._busy += self._clock.now() - self._since

  def _price(self, reply: Reply, worst: float) -> Price:
    if reply.input_tokens is None or reply.output_tokens is None:
      return Price(None, None, worst)
    return Price(
      reply.input_tokens, reply.output_tokens, cost_of(reply.input_tokens, reply.output_tokens, self._endpoint)
    )

  def _fail(self, reason: str) -> Failure:
    self._failed += 1
    limit = self._endpoint.max_failure_rate
    if self._failed > limit * max(self._asked, FEW):
      self._stop(
        f"{self._where}: {self._failed} of {self._asked} questions to {self._endpoint.base_url} failed, more than "
        f"{self._where}.endpoint.max_failure_rate = {limit:g} allows (the last: {reason}); every answer so far is "
        "kept: run the same command again to continue"
      )
    return Failure(reason)

  def _stop(self, message: str) -> NoReturn:
    self._stopped = self._stopped or UserError(message)
    raise self._stopped

  async def _drain(self, spared: Collection[asyncio.Task]) -> None:
    """Ends all questions but the spared ones, and waits for these."""
    for task in [task for task in self._pending.values() if task not in spared]:
      task.cancel()
    await asyncio.gather(*self._pending.values(), return_exceptions=True)

  async def _finish(self, at_once: bool) -> None:
    self._stopped = self._stopped or UserError(f"{self._where}: judging was ended")
    await self._drain(() if at_once else self._sending)
    await self._client.close()


def request_body(settings: ChatTeacher, question: Question) -> dict[str, Any]:
  """The request for an answer to this question."""
  body: dict[str, Any] = {"model": settings.model, "messages": question.messages, **question.fields}
  body[settings.endpoint.limit_field] = settings.max_tokens
  if settings.temperature is not None:
    body["temperature"] = settings.temperature
  return body | ({"extra_body": settings.extra_body} if settings.extra_body else {})

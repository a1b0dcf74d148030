"""The ledger: every request that a run sent to a paid teacher, what became of it, and what it cost."""

import asyncio
import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tsalign_jax.config import ChatTeacher, Endpoint
from tsalign_jax.teachers.database import open_database, read_database
from tsalign_jax.teachers.store import Price
from tsalign_jax.types import Conversation

FILE = "ledger.sqlite"  # in the run folder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
  id INTEGER PRIMARY KEY,
  teacher TEXT NOT NULL,
  key TEXT NOT NULL,         -- of the question, as in the verdict store
  outcome TEXT NOT NULL,
  input_tokens INTEGER,
  output_tokens INTEGER,
  cost REAL NOT NULL,        -- the most it can have cost while that is unknown
  time REAL NOT NULL         -- when it was sent, seconds since 1970
)
"""


class Outcome(enum.StrEnum):
  """What became of a request."""

  SENT = "sent"  # unknown: the process ended before an answer came
  ANSWERED = "answered"
  MALFORMED = "malformed"
  RATE_LIMITED = "rate limited"
  SERVER_ERROR = "server error"
  TIMED_OUT = "timed out"
  DROPPED = "dropped"
  UNREACHED = "unreached"  # no connection, so the server never saw it
  REFUSED = "refused"


# A server may charge for an answer that never arrived, so these count at their worst.
UNKNOWN_COST = (Outcome.SENT, Outcome.TIMED_OUT, Outcome.DROPPED)


class OverBudget(Exception):
  """The next request could exceed the budget, and no request is under way whose end would make room."""


class Ledger:
  """The requests of one teacher in one run; holds them within the budget. To be used on one event loop."""

  def __init__(self, file: Path, teacher: str, budget: float | None, now: Callable[[], float]):
    self._database = open_database(file, _SCHEMA)
    self._teacher, self._budget, self._now = teacher, budget, now
    total = "SELECT total(cost), total(input_tokens) + total(output_tokens) FROM attempts WHERE teacher = ?"
    self.spent, self.tokens = self._database.execute(total, (teacher,)).fetchone()
    self._open: dict[int, float] = {}  # requests under way, at their worst
    self._settled = asyncio.Event()

  async def reserve(self, key: str, worst: float) -> int:
    """The number of a request that may be sent now, as it keeps within the budget even at its worst.

    Waits for requests under way where these leave no room. Raises OverBudget when there are none to wait for.
    """
    while self._budget is not None and self.spent + sum(self._open.values()) + worst > self._budget:
      if not self._open:
        raise OverBudget
      self._settled.clear()
      await self._settled.wait()
    row = (self._teacher, key, Outcome.SENT, worst, self._now())
    columns = "(teacher, key, outcome, cost, time)"
    number = self._database.execute(f"INSERT INTO attempts {columns} VALUES (?, ?, ?, ?, ?)", row).lastrowid
    self._open[number] = worst
    return number

  def settle(self, number: int, outcome: Outcome, price: Price) -> None:
    """Records what became of a request; committed before this returns."""
    row = (outcome, price.input_tokens, price.output_tokens, price.cost, number)
    columns = "outcome = ?, input_tokens = ?, output_tokens = ?, cost = ?"
    self._database.execute(f"UPDATE attempts SET {columns} WHERE id = ?", row)
    self._end(number, price.cost)
    self.tokens += (price.input_tokens or 0) + (price.output_tokens or 0)

  def abandon(self, number: int) -> None:
    """Waits no longer for a request that nobody will settle: it stays SENT, at its worst."""
    if number in self._open:
      self._end(number, self._open[number])

  def close(self) -> None:
    """Closes the file."""
    self._database.close()

  def _end(self, number: int, cost: float) -> None:
    del self._open[number]
    self.spent += cost
    self._settled.set()


def worst_cost(messages: Conversation, settings: ChatTeacher) -> float:
  """The most that a request can cost: a token holds at least one byte, and a chat template adds some of its own."""
  input_tokens = sum(len(message["content"].encode()) + 16 for message in messages) + 256
  further = len(json.dumps(settings.extra_body).encode()) if settings.extra_body else 0  # it may hold tools or a schema
  return cost_of(input_tokens + further, settings.max_tokens, settings.endpoint)


def cost_of(input_tokens: int, output_tokens: int, endpoint: Endpoint) -> float:
  """Cost in the currency of the prices."""
  return (input_tokens * endpoint.input_price + output_tokens * endpoint.output_price) / 1e6


class Account(NamedTuple):
  """Requests of one teacher with one outcome, summed up."""

  teacher: str
  outcome: Outcome
  requests: int
  input_tokens: int
  output_tokens: int
  cost: float


def accounts(file: Path) -> list[Account]:
  """What a ledger holds, by teacher and outcome; nothing if there is no ledger."""
  totals = "count(*), total(input_tokens), total(output_tokens), total(cost)"
  rows = read_database(file, "attempts", f"SELECT teacher, outcome, {totals} FROM attempts GROUP BY 1, 2 ORDER BY 1, 2")
  return [Account(name, Outcome(what), count, int(i), int(o), cost) for name, what, count, i, o, cost in rows]

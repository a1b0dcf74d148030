"""The verdict store: every readable answer that was paid for, so that no question is paid for twice."""

import dataclasses
from pathlib import Path

from tsalign_jax.teachers.database import open_database

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY,      -- hash of the teacher's identity, the prompt and the responses in their order
  teacher TEXT NOT NULL,
  reading TEXT NOT NULL,     -- what the answer was read as: A, B, C or 2 > 1 > 3
  probability REAL,          -- that the first response is better, where log-probabilities were given
  text TEXT NOT NULL,        -- the answer itself
  model TEXT,                -- as the server names it
  input_tokens INTEGER,
  output_tokens INTEGER,
  cost REAL NOT NULL,
  time REAL NOT NULL         -- seconds since 1970
) WITHOUT ROWID
"""


@dataclasses.dataclass(frozen=True)
class Answer:
  """A readable answer: what it was read as, the probability that the first response is better, and its text."""

  reading: str
  probability: float | None
  text: str


@dataclasses.dataclass(frozen=True)
class Price:
  """What an answer took: tokens where the server counted them, and cost."""

  input_tokens: int | None
  output_tokens: int | None
  cost: float


class VerdictStore:
  """Answers by the key of their question, in an SQLite file. Failures have no place in it."""

  def __init__(self, file: Path):
    self._database = open_database(file, _SCHEMA)

  def get(self, key: str) -> Answer | None:
    """The stored answer to a question."""
    row = self._database.execute("SELECT reading, probability, text FROM answers WHERE key = ?", (key,)).fetchone()
    return Answer(*row) if row else None

  def put(self, key: str, teacher: str, answer: Answer, price: Price, model: str | None, time: float) -> Answer:
    """Stores an answer, committed before this returns; returns what is stored, as another run may have been first."""
    row = (key, teacher, *dataclasses.astuple(answer), model, *dataclasses.astuple(price), time)
    self._database.execute(f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * len(row))})", row)
    return self.get(key) or answer

  def close(self) -> None:
    """Closes the file."""
    self._database.close()

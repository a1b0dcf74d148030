"""The verdict store: every readable answer that was paid for and every score, so that none is asked for twice."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tsalign_jax.teachers.database import open_database, read_database

STORE = "verdicts.sqlite"  # in the run folder

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY,      -- hash of who answers and of what is asked: template, prompt, responses in order
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


_SCORES = """
CREATE TABLE IF NOT EXISTS scores (
  key TEXT PRIMARY KEY,      -- hash of the teacher's identity, the prompt and the response
  teacher TEXT NOT NULL,
  score REAL NOT NULL,
  tokens INTEGER NOT NULL,   -- that were read
  cut INTEGER NOT NULL,      -- 1 where prompt and response were longer than what was read
  seconds REAL NOT NULL      -- its share of the time that scoring took
) WITHOUT ROWID
"""


@dataclasses.dataclass(frozen=True)
class Score:
  """A reward model's score of a response; how many tokens it read, whether that is not all, and the time it took."""

  value: float
  tokens: int
  cut: bool
  seconds: float


class Scored(NamedTuple):
  """What a reward model has scored, summed up; `cut` counts the responses of which it did not read everything."""

  teacher: str
  responses: int
  tokens: int
  cut: int
  seconds: float


_TOTAL = "SELECT teacher, count(*), total(tokens), total(cut), total(seconds) FROM scores"


class ScoreStore:
  """Scores by the key of prompt and response, in an SQLite file."""

  def __init__(self, file: Path):
    self._database = open_database(file, _SCORES)

  def get(self, keys: Sequence[str]) -> dict[str, Score]:
    """Those of the scores that are stored."""
    query = "SELECT score, tokens, cut, seconds FROM scores WHERE key = ?"
    rows = {key: self._database.execute(query, (key,)).fetchone() for key in dict.fromkeys(keys)}
    return {key: Score(row[0], row[1], bool(row[2]), row[3]) for key, row in rows.items() if row}

  def put(self, teacher: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    """Stores all of them or, if the process dies, none; returns what is stored, as another run may have been first.

    A score depends in its last digits on what it was computed with. Because of all or none, a run that was killed
    computes it with the same again.
    """
    rows = [(key, teacher, *dataclasses.astuple(score)) for key, score in scores.items()]
    self._database.execute("BEGIN IMMEDIATE")
    try:
      add = "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
      self._database.executemany(add, rows)
    except BaseException:
      self._database.execute("ROLLBACK")
      raise
    self._database.execute("COMMIT")
    return self.get(list(scores))

  def total(self, teacher: str) -> Scored:
    """What this teacher has scored."""
    _, *sums = self._database.execute(f"{_TOTAL} WHERE teacher = ?", (teacher,)).fetchone()
    return _scored(teacher, *sums)

  def close(self) -> None:
    """Closes the file."""
    self._database.close()


def scored(file: Path) -> list[Scored]:
  """What a store's reward models have scored, each by itself; nothing if there is no store or no score in it."""
  return [_scored(*row) for row in read_database(file, "scores", f"{_TOTAL} GROUP BY 1 ORDER BY 1")]


def _scored(teacher: str, responses: int, tokens: float, cut: float, seconds: float) -> Scored:
  return Scored(teacher, responses, int(tokens), int(cut), seconds)

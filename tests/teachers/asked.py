"""What the tests of networked teachers share: pairs with a known truth, settings, and a clock that does not wait."""

import asyncio
import sqlite3

from chat_server import ChatServer

from tsalign_jax.config import JudgeTeacher, RankerTeacher
from tsalign_jax.teachers.chat import Clock
from tsalign_jax.teachers.llm_judge import LLMJudge
from tsalign_jax.teachers.ranker import Ranker
from tsalign_jax.types import CandidatePair, Prompt, Verdict

KEY = "sk-a-key-that-nobody-may-see"


class Waits(list):
  """A clock's sleep that notes how long it was to be and goes on at once."""

  async def __call__(self, seconds: float) -> None:
    self.append(seconds)
    await asyncio.sleep(0)


def prompt(number: int = 0) -> Prompt:
  return Prompt(number, [{"role": "user", "content": f"Question {chr(97 + number)}?"}])


def pair(first: int, second: int, number: int = 0) -> CandidatePair:
  """Responses of which the one with the larger number is better, as the test server's model sees it."""
  return CandidatePair(prompt(number), f"worth {first}", f"worth {second}")


def pairs(count: int) -> list[CandidatePair]:
  return [pair(index % 3, index // 3 % 3, index) for index in range(count)]


def truth(pair: CandidatePair) -> Verdict:
  first, second = (int(text.split()[1]) for text in (pair.first, pair.second))
  return Verdict.FIRST if first > second else Verdict.SECOND if second > first else Verdict.TIE


def endpoint(server: ChatServer, **changes) -> dict:
  return {"base_url": server.url, "timeout": 5.0, "api_key_env": "JUDGE_KEY"} | changes


def judge(server: ChatServer, run, sleep=None, *, on: dict | None = None, **changes) -> LLMJudge:
  """A judge that asks this server; `on` changes its endpoint, other arguments the rest."""
  settings = JudgeTeacher(model="judge-1", endpoint=endpoint(server, **(on or {})), **changes)
  return LLMJudge(settings, run, "teacher", Clock(sleep=Waits() if sleep is None else sleep))


def ranker(server: ChatServer, run, **changes) -> Ranker:
  settings = RankerTeacher(model="judge-1", endpoint=endpoint(server), **changes)
  return Ranker(settings, run, "teacher", Clock(sleep=Waits()))


def rows(file, query: str) -> list[tuple]:
  """The answer to a query of an SQLite file."""
  database = sqlite3.connect(file)
  found = database.execute(query).fetchall()
  database.close()
  return found

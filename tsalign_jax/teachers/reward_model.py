"""The `reward_model` teacher: a reward model scores each response by itself, and the higher score wins.

It reads messages and text through its own tokenizer and chat template, and shares no tokens with policy or student.
A response that was scored once is not scored again: scores are stored by prompt and response, for a run or for several.
"""

import hashlib
import json
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Self

import jax
import numpy as np

from tsalign_jax.config import Mesh
from tsalign_jax.config import RewardModelTeacher as Settings
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import fingerprint, prompt_key
from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.loading import reward_model
from tsalign_jax.pairing.statistics import sign
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.scoring.reward import RewardEngine, build_reward_engine, check_reader
from tsalign_jax.teachers.base import Teacher, Work
from tsalign_jax.teachers.store import STORE, Score, ScoreStore
from tsalign_jax.types import CandidatePair, Conversation, Judgement, Prompt, UserError

RULES = 1  # to be raised when scores come out differently for the same model, so that old ones are not taken for new
TOGETHER = 2  # responses to a prompt in one row of a batch: always as many, so that few programs are compiled

Question = tuple[Conversation, str]


class RewardModelTeacher(Teacher):
  """Prefers the response with the higher score; the probability is that of Bradley and Terry's model."""

  def __init__(self, settings: Settings, run: Path, where: str, mesh: Mesh):
    """`where` is the teacher's key in the configuration. Raises UserError for a folder that cannot give scores."""
    config = check_reader(settings)
    if not config.reward_head:
      raise UserError(
        f"{where}.path: {settings.path} has no reward head; `tsalign train-reward` trains one and writes such a folder"
      )
    self._limit = min(settings.max_tokens, config.max_tokens)
    content = [RULES, fingerprint(settings.path), settings.max_tokens, settings.dtype, settings.param_dtype]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    self.identity = f"reward_model {settings.path.name} {digest}"
    self._settings, self._run, self._where, self._mesh = settings, run, where, mesh
    self._chat = Chat.load(settings.path) if isinstance(config, DecoderConfig) else None
    self._model: tuple[RewardEngine, dict[str, jax.Array]] | None = None

  @property
  def opinions(self) -> Set[str]:
    """Those of its weights, in any dtype and however much it reads."""
    return {f"reward_model {fingerprint(self._settings.path)}"}

  def validate_prompts(self, prompts: Sequence[Prompt], source: str) -> None:
    """Raises UserError that names the first row which the model's chat template refuses, such as a system turn."""
    if self._chat:
      self._chat.check(((prompt.id + 1, prompt.messages) for prompt in prompts), source, self._where)

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order. Evidence: the two scores, their difference, and what was cut."""
    scores = iter(self._known([(pair.prompt.messages, text) for pair in pairs for text in (pair.first, pair.second)]))
    return [compare(next(scores), next(scores)) for _ in pairs]

  def scores(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[float]]:
    """The score of each response to each prompt."""
    found = iter(self._known([(prompt.messages, text) for prompt, responses in asked for text in responses]))
    return [[next(found).value for _ in responses] for _, responses in asked]

  def worked(self) -> Work:
    """Pairs that were scored here, as two responses each, without the time of loading the model."""
    return self._work

  def note(self) -> str:
    """How much has been scored so far: in this run, or in all that share its store."""
    total = self._store.total(self.identity)
    cut = f", {total.cut:,} cut to {self._limit} tokens" if total.cut else ""
    return f"{total.responses:,} responses scored{cut}"

  def __enter__(self) -> Self:
    self._store = ScoreStore(self._settings.store or self._run / STORE)
    self._work = Work(0.0, 0.0)
    return self

  def __exit__(self, *exception: object) -> None:
    self._store.close()
    self._model = None  # gives the memory back

  def _known(self, asked: Sequence[Question]) -> list[Score]:
    """Scores from the store; those that are not in it are computed and stored."""
    keys = [self._key(question) for question in asked]
    known = self._store.get(keys)
    missing = {key: question for key, question in zip(keys, asked, strict=True) if key not in known}
    if missing:
      known |= self._store.put(self.identity, dict(zip(missing, self._compute([*missing.values()]), strict=True)))
    return [known[key] for key in keys]

  def _key(self, question: Question) -> str:
    return hashlib.sha256(json.dumps([self.identity, *question]).encode()).hexdigest()

  def _compute(self, asked: Sequence[Question]) -> list[Score]:
    """Scores of responses that are not in the store, all in one go."""
    engine, params = self._loaded()
    started = time.monotonic()
    rows = _rows(asked)
    items = [engine.encode(asked[row[0]][0], [asked[index][1] for index in row]) for row in rows]
    found = dict(engine.score(params, items))
    taken = time.monotonic() - started
    self._work = Work(self._work.pairs + len(asked) / 2, self._work.seconds + taken)
    seconds = taken / len(asked)
    scores: dict[int, Score] = {}
    for number, (row, item) in enumerate(zip(rows, items, strict=True)):
      for index, *score in zip(row, found[number], item.lengths, item.cut, strict=True):
        scores[index] = Score(*score, seconds)
    return [scores[index] for index in range(len(asked))]

  def _loaded(self) -> tuple[RewardEngine, dict[str, jax.Array]]:
    """The model, brought to the devices when the first response is to be scored."""
    if self._model is None:
      model, mesh = reward_model(self._settings), make_mesh(**self._mesh.model_dump())
      self._model = build_reward_engine(model, mesh, self._settings), model.load(mesh)
    return self._model


def compare(first: Score, second: Score) -> Judgement:
  """The judgement of a pair from its scores: P(first is better) = sigmoid(difference) (Bradley and Terry 1952)."""
  margin = first.value - second.value
  evidence = {"first": _evidence(first), "second": _evidence(second), "margin": margin}
  return Judgement(sign(margin), float(np.exp(-np.logaddexp(0.0, -margin))), evidence)


def _evidence(score: Score) -> dict[str, float | bool]:
  return {"score": score.value} | ({"cut": True} if score.cut else {})


def _rows(asked: Sequence[Question]) -> list[list[int]]:
  """Indices of the questions, `TOGETHER` of one prompt to a row; the last one of a prompt may stand twice."""
  by_prompt: dict[str, list[int]] = {}
  for index, (prompt, _) in enumerate(asked):
    by_prompt.setdefault(prompt_key(prompt), []).append(index)
  rows = []
  for indices in by_prompt.values():
    for start in range(0, len(indices), TOGETHER):
      row = indices[start : start + TOGETHER]
      rows.append(row + row[-1:] * (TOGETHER - len(row)))
  return rows

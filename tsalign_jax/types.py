"""The vocabulary shared by every floor: conversations, branches, verdicts and pairs."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

Message = dict[str, str]  # {"role": "user", "content": "..."}
Conversation = list[Message]


class UserError(Exception):
  """Wrong input that its author can mend: one sentence that names the key or row and the fix (exit code 2)."""


class Prompt(NamedTuple):
  """One prompt of a run; `id` is its row in the file it came from and seeds everything random about it."""

  id: int
  messages: Conversation
  checks: Sequence[dict] = ()  # what the `checks` teacher verifies, empty for other teachers


class Finish(enum.StrEnum):
  """Why a response ended: at an end-of-sequence token, or at the limit of new tokens."""

  STOP = "stop"
  LENGTH = "length"


class Verdict(enum.StrEnum):
  """A teacher's answer about a pair. Only FIRST and SECOND make a preference; an ERROR never does."""

  FIRST = "first"
  SECOND = "second"
  TIE = "tie"
  INCONSISTENT = "inconsistent"
  ERROR = "error"


@dataclasses.dataclass(frozen=True)
class CandidatePair:
  """Two responses to one prompt, put before a teacher. The teacher is not told which one the student prefers."""

  prompt: Prompt
  first: str
  second: str


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A verdict, the probability that `first` is better where the teacher gives one, and what it rests on."""

  verdict: Verdict
  probability: float | None = None
  evidence: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """Responses to a prompt in their true order, to show a ranker how it is done; `order` holds indices, best first."""

  prompt: Conversation
  responses: Sequence[str]
  order: Sequence[int]


@dataclasses.dataclass(frozen=True)
class CandidateList:
  """Responses to one prompt, put before a ranker, with demonstrations for this prompt only."""

  prompt: Prompt
  responses: Sequence[str]
  demonstrations: Sequence[Demonstration] = ()


@dataclasses.dataclass(frozen=True)
class Ranking:
  """A ranker's order of the responses, as indices, best first, and what it rests on; an order of None is an ERROR."""

  order: tuple[int, ...] | None
  evidence: dict = dataclasses.field(default_factory=dict)


class PreferencePair(NamedTuple):
  """A prompt with a better and a worse response, as text: what crosses from one tokenizer to another.

  `margin` is by how much the score of the better one should be ahead.
  """

  prompt: Conversation
  chosen: str
  rejected: str
  margin: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
  """Prompts with K responses each: the batch layout of sampling and scoring.

  The trunk holds prompt tokens, left-padded, so that it ends where its branches begin; a branch holds the tokens
  of one response, right-padded. Positions of a branch continue those of its trunk:

      trunk     _ _ 7 8 9        trunk_length  3, positions 0 1 2
      branch 0  4 5 6 _          branch_length 3, positions 3 4 5
      branch 1  4 2 _ _          branch_length 2, positions 3 4
  """

  trunk: Int[np.ndarray | jax.Array, "batch prompt"]
  branches: Int[np.ndarray | jax.Array, "batch k response"]
  trunk_length: Int[np.ndarray | jax.Array, " batch"]
  branch_length: Int[np.ndarray | jax.Array, "batch k"]

  @property
  def trunk_mask(self) -> Bool[jax.Array, "batch prompt"]:
    """True at the real tokens of each trunk."""
    columns = np.arange(self.trunk.shape[1])
    return columns >= self.trunk.shape[1] - self.trunk_length[:, None]

  @property
  def branch_mask(self) -> Bool[jax.Array, "batch k response"]:
    """True at the real tokens of each branch."""
    return np.arange(self.branches.shape[2]) < self.branch_length[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of prompts with K responses each, one after the other: what models are trained on.

      tokens     7 8 9 4 5 6 4 2   3 3 5 1 _ _     a trunk of 3 with branches of 3 and 2; one of 2 with two of 1
      item       1 1 1 1 1 1 1 1   2 2 2 2 0 0     0: nothing
      branch     0 0 0 1 1 1 2 2   0 0 1 2 0 0     0: the trunk
      position   0 1 2 3 4 5 3 4   0 1 2 2 0 0

  A token sees its item's trunk and the earlier tokens of its own branch. The response tokens are listed apart, for all
  rows of a device together, because rows differ more in how many they have:

      target     4 5 6 4 2 5 1 _
      predictor  2 3 4 2 6 9 9 _     row * columns + column of the hidden state that predicts it
      owner      0 0 0 1 1 2 3 4     (row * items + item) * K + branch, from 0; rows * items * K: nothing
  """

  tokens: Int[np.ndarray | jax.Array, "rows columns"]
  position: Int[np.ndarray | jax.Array, "rows columns"]
  item: Int[np.ndarray | jax.Array, "rows columns"]
  branch: Int[np.ndarray | jax.Array, "rows columns"]
  target: Int[np.ndarray | jax.Array, "devices targets"]
  predictor: Int[np.ndarray | jax.Array, "devices targets"]
  owner: Int[np.ndarray | jax.Array, "devices targets"]
  length: Int[np.ndarray | jax.Array, "rows items k"]  # tokens of each branch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
  """Rows of texts, one after the other, each of a prompt with one of its K responses: what encoders read.

      tokens     1 8 9 2 4 5 2   1 6 2 7 2 _ _     two texts, of 7 tokens and of 5
      types      0 0 0 0 1 1 1   0 0 0 1 1 0 0     BERT's own name for which part of a text it is
      text       1 1 1 1 1 1 1   2 2 2 2 2 0 0     0: nothing
      position   0 1 2 3 4 5 6   0 1 2 3 4 0 0
      first      0 7 0                             the column where each text begins; 0 where there is none

  A token sees all of its own text. `place` says where a prompt's texts lie: row * (texts of a row) + text, from 0.
  """

  tokens: Int[np.ndarray | jax.Array, "rows columns"]
  types: Int[np.ndarray | jax.Array, "rows columns"]
  text: Int[np.ndarray | jax.Array, "rows columns"]
  position: Int[np.ndarray | jax.Array, "rows columns"]
  first: Int[np.ndarray | jax.Array, "rows texts"]
  place: Int[np.ndarray | jax.Array, "items k"]


class Rollout(NamedTuple):
  """One sampled response: its tokens (with the end-of-sequence token, if it came), text and log-probability.

  `logprob` is the sum over its tokens of the policy's log-probability at temperature 1, without any filter.
  """

  prompt_id: int
  response_id: int
  tokens: list[int]
  text: str
  logprob: float
  finish: Finish

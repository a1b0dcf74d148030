"""Reward models: text in, one score a response out; decoders read trunks with branches, encoders each text apart."""

import abc
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsalign_jax.config import RewardModel
from tsalign_jax.data.batching import bucket, make_branches, part_size
from tsalign_jax.data.chat import Chat, load_tokenizer
from tsalign_jax.data.packing import Item, Packing, row_cost, row_length
from tsalign_jax.data.texts import Text, TextPacking, make_texts
from tsalign_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from tsalign_jax.models.functional import Params
from tsalign_jax.models.hf import WeightFiles
from tsalign_jax.models.loading import ModelHandle, reward_config
from tsalign_jax.parallel.mesh import batch_ways, pipelined, put_batch
from tsalign_jax.types import Branches, Conversation, Packed, Texts, UserError

FEW = 4  # responses to a prompt that go into packed rows, where the model is a decoder
ROOM = 1.1  # of packed rows, for what is left over in them
SERVED = 4  # batches that a program for narrow steps of widths has to serve, so that it spares more than it costs
COARSE = 4  # steps of widths for fewer


class Encoded(NamedTuple):
  """One prompt with its responses as tokens; `cut` says which of them lost tokens to the limit, with their prompt."""

  prompt: list[int]
  responses: list[list[int]]
  types: list[list[int]]
  cut: list[bool]

  @property
  def lengths(self) -> list[int]:
    """Tokens of prompt plus response, for each response."""
    return [len(self.prompt) + len(response) for response in self.responses]

  @property
  def width(self) -> int:
    """Tokens of the longest prompt plus response."""
    return max(self.lengths)


class Batches(Protocol):
  """How items are laid into batches."""

  def batches(self, indices: Sequence[int]) -> Iterator[tuple[Any, Int[np.ndarray, "*places"]]]:
    """Host batches that hold these items, and which item is where its rewards come out: -1 where there is none."""
    ...


class RewardEngine(abc.ABC):
  """How one kind of reward model reads text, makes batches and scores them."""

  steps = 8  # of widths, where there is work enough to compile a program for each

  def __init__(self, model: ModelHandle, mesh: Mesh, settings: RewardModel):
    self.model, self.mesh = model, mesh
    self.batch_tokens = settings.batch_tokens
    self.limit = min(settings.max_tokens, model.config.max_tokens)
    self._how = {"mesh": mesh, "dtype": model.dtype, "remat": model.remat}

    @jax.jit
    def program(params: Params, batch) -> Float[Array, "*places k"]:
      return self.rewards(model.skeleton.bind(params), batch)

    @jax.jit
    def feature_program(params: Params, batch) -> Float[Array, "*places k features"]:
      return self.features(model.skeleton.bind(params), batch).astype(jnp.float32)

    self.program, self.feature_program = program, feature_program

  @abc.abstractmethod
  def encode(self, prompt: Conversation, responses: Sequence[str]) -> Encoded:
    """Tokens of a prompt with its responses, cut to the limit."""

  @abc.abstractmethod
  def collate(self, items: Sequence[Encoded], steps: int) -> Any:
    """A host batch of prompts with the same number of responses, in the narrowest shape that holds them.

    Its widths come in so many steps: see `bucket`.
    """

  @abc.abstractmethod
  def widths(self, items: Sequence[Encoded], steps: int) -> tuple[int, int]:
    """What each of these items takes in a batch of them: columns of its prompt, and of each response."""

  def tokens(self, items: Sequence[Encoded], steps: int) -> int:
    """Tokens that each of these items takes in a batch of them, padding included."""
    prompt, response = self.widths(items, steps)
    return prompt + len(items[0].responses) * response

  @abc.abstractmethod
  def rewards(self, module, batch) -> Float[Array, "*places k"]:
    """The score of every response in a batch; traceable and differentiable."""

  @abc.abstractmethod
  def features(self, module, batch) -> Float[Array, "*places k features"]:
    """What the last map of the reward head reads of every response in a batch."""

  def lay_out(self, items: Sequence[Encoded], at_once: int, tokens: int) -> Batches:
    """Batches of at most `tokens` tokens for items with the same number of responses; `at_once` come together."""
    narrow = Alike(self, items, at_once, tokens, self.steps)
    shapes = [
      (self.widths([items[index] for index in part], self.steps), size) for part, size in narrow.parts(range(at_once))
    ]
    return narrow if SERVED * len(set(shapes)) <= len(shapes) else narrow._replace(steps=COARSE)

  def score(self, params: Params, items: Sequence[Encoded]) -> Iterator[tuple[int, list[float]]]:
    """(index of the item, its scores), in batches of like width, so that they hold little padding."""
    units = list(self._units(items))
    found: dict[int, dict[int, float]] = {}
    batches = self._batches([unit for *_, unit in units])
    launched = ((place, self.program(params, put_batch(batch, self.mesh))) for batch, place in batches)
    for place, scores in pipelined(launched):
      if not np.isfinite(scores := np.asarray(scores)).all():
        raise UserError(f"{self.model.folder}: its scores are not finite; retrain it, or begin a run in float32")
      for where in np.argwhere(place >= 0):
        index, responses, _ = units[place[tuple(where)]]
        got = found.setdefault(index, {})
        got |= {k: float(score) for k, score in zip(responses, scores[tuple(where)], strict=True)}
        if len(got) == len(items[index].responses):
          yield index, [got[k] for k in range(len(got))]

  def _batches(self, units: Sequence[Encoded]) -> Iterator[tuple[Any, Int[np.ndarray, "*places"]]]:
    """Host batches, and which unit is where."""
    for count in sorted({len(unit.responses) for unit in units}):
      alike = [index for index, unit in enumerate(units) if len(unit.responses) == count]
      laid_out = self.lay_out([units[index] for index in alike], len(alike), self.batch_tokens)
      for batch, place in laid_out.batches(range(len(alike))):
        yield batch, np.where(place >= 0, np.asarray(alike)[place], -1)

  def count_batches(self, items: Sequence[Encoded]) -> int:
    """How many batches `score` computes for these items."""
    return sum(1 for _ in self._batches([unit for *_, unit in self._units(items)]))

  @abc.abstractmethod
  def _units(self, items: Sequence[Encoded]) -> Iterator[tuple[int, Sequence[int], Encoded]]:
    """(index of an item, which of its responses, the item with these alone): what is laid out as one."""


class Alike(NamedTuple):
  """Batches of items of like width, widest first; one that is short repeats its first item."""

  engine: RewardEngine
  items: Sequence[Encoded]
  at_once: int
  tokens: int
  steps: int

  def batches(self, indices: Sequence[int]) -> Iterator[tuple[Any, Int[np.ndarray, " batch"]]]:
    """Batches, and which item is in which row: -1 where there is none."""
    for part, size in self.parts(indices):
      empty = size - len(part)
      batch = self.engine.collate([self.items[index] for index in part + part[:1] * empty], self.steps)
      yield batch, np.asarray(part + [-1] * empty)

  def parts(self, indices: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """The items of each batch, and how many it has room for."""
    left = sorted(indices, key=lambda index: (-self._tokens([index]), index))
    while left:
      most = min(self.tokens // self._tokens(left[:1]), self.at_once)
      while most > 1 and most * self._tokens(left[:most]) > self.tokens:  # the longest prompt is not the first one's
        most //= 2
      size = part_size(len(left), most, batch_ways(self.engine.mesh))
      yield left[:size], size
      left = left[size:]

  def _tokens(self, indices: Sequence[int]) -> int:
    return self.engine.tokens([self.items[index] for index in indices], self.steps)


class DecoderEngine(RewardEngine):
  """A prompt once for all of its responses; the conversation in the model's own chat template."""

  def __init__(self, model: ModelHandle, mesh: Mesh, settings: RewardModel, chat_template: Path | None = None):
    super().__init__(model, mesh, settings)
    self.chat = Chat.load(model.folder, chat_template)

  def encode(self, prompt: Conversation, responses: Sequence[str]) -> Encoded:
    """The templated conversations; over the limit, the prompt loses its start and then a response its end.

    What the template writes behind a response stays: the reward is read there. Each conversation has the tokens that it
    would have alone: what all of them begin with, up to where the answer starts, is the trunk. Where one has to be cut,
    what is left of the prompt differs by response, and all bring their own.
    """
    whole = [self.chat.conversation_tokens([*prompt, {"role": "assistant", "content": text}]) for text in responses]
    end = min(len(self.chat.prompt_tokens(prompt)), min(map(len, whole)) - 1)
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*whole, strict=False))
    shared = len(list(itertools.islice(alike, end)))
    trunk, branches = whole[0][:shared], [tokens[shared:] for tokens in whole]
    cut = [len(trunk) + len(branch) > self.limit for branch in branches]
    if not any(cut):
      return Encoded(trunk, branches, [], cut)
    return Encoded([], [self._fitted(trunk, row) for row in branches], [], cut)

  def _fitted(self, trunk: list[int], branch: list[int]) -> list[int]:
    whole = trunk[-max(1, self.limit - len(branch)) :] + branch
    over = max(0, len(whole) - self.limit)
    end = len(whole) - self._ending
    return whole[: end - over] + whole[end:]

  @functools.cached_property
  def _ending(self) -> int:
    """How many tokens the template writes behind a response."""
    ask = {"role": "user", "content": "a"}
    two = (self.chat.conversation_tokens([ask, {"role": "assistant", "content": text}])[::-1] for text in "ab")
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*two, strict=False))
    return min(len(list(alike)), self.limit - 1)

  def collate(self, items: Sequence[Encoded], steps: int) -> Branches:
    """Trunks and branches, each with a width of their own."""
    return make_branches(
      [item.prompt for item in items], [item.responses for item in items], *self.widths(items, steps)
    )

  def widths(self, items: Sequence[Encoded], steps: int) -> tuple[int, int]:
    """Those of the longest prompt and of the longest response."""
    prompts = (len(item.prompt) for item in items)
    responses = (len(response) for item in items for response in item.responses)
    return bucket(max(prompts), steps), bucket(max(responses), steps)

  def rewards(self, module, batch: Branches | Packed) -> Float[Array, "*places k"]:
    """The reward at each branch's last real token."""
    return module(batch, **self._how)

  def features(self, module, batch: Branches | Packed) -> Float[Array, "*places k embed"]:
    """Hidden states at these tokens."""
    return module.features(batch, **self._how)

  def lay_out(self, items: Sequence[Encoded], at_once: int, tokens: int) -> Batches:
    """Few responses: packed rows, so that one or two programs serve all lengths. Many: trunks with branches.

    Of trunks and branches, each pair of widths is a program, and they are for responses of like lengths (see `_units`):
    in rows, most tokens of many responses would see nothing of each other.
    """
    if len(items[0].responses) > FEW:
      return super().lay_out(items, at_once, tokens)
    packed = [Item(item.prompt, item.responses) for item in items]
    return Packing(packed, at_once, tokens, batch_ways(self.mesh), roomy=True)

  def _units(self, items: Sequence[Encoded]) -> Iterator[tuple[int, Sequence[int], Encoded]]:
    """Whole items where few tokens pad them; else a few responses of like lengths each, with a prompt of their own.

    A response attends to its prompt and to itself, but in packed rows to all of its row.
    """
    parts = [_by_length(item) for item in items]
    tokens = [
      len(item.prompt) + sum(len(item.responses[k]) for k in part)
      for item, of in zip(items, parts, strict=True)
      for part in of
    ]
    length = row_length(max(tokens, default=0))
    whole = sum(row_cost(self.tokens([item], self.steps), sum(self.widths([item], self.steps))) for item in items)
    divided = ROOM * row_cost(sum(tokens), length) < whole
    for index, (item, of) in enumerate(zip(items, parts, strict=True)):
      for part in of if divided else [range(len(item.responses))]:
        responses, cut = ([values[k] for k in part] for values in (item.responses, item.cut))
        yield index, part, item._replace(responses=responses, cut=cut)


class EncoderEngine(RewardEngine):
  """Each prompt plus response is a text of its own, of two parts."""

  steps = 16

  def __init__(self, model: ModelHandle, mesh: Mesh, settings: RewardModel):
    super().__init__(model, mesh, settings)
    self.tokenizer = load_tokenizer(model.folder)
    self.tokenizer.truncation_side = "left"
    self.specials = self.tokenizer.num_special_tokens_to_add(pair=True)
    if self.limit <= self.specials:
      raise UserError(f"{model.folder}: max_tokens = {self.limit} leaves no room beside {self.specials} special tokens")

  def encode(self, prompt: Conversation, responses: Sequence[str]) -> Encoded:
    """[CLS] prompt [SEP] response [SEP], or as the family writes it; over the limit, the prompt loses its start."""
    # As lists, because of a single pair with an empty response the tokenizer would take the prompt alone.
    prompts = [conversation_text(prompt)] * len(responses)
    kept, cut = self.tokenizer(prompts, list(responses)), [False] * len(responses)
    if max(map(len, whole := kept["input_ids"])) > self.limit:
      fitted = [self._fit(response) for response in responses]
      kept = self.tokenizer(prompts, [text for text, _ in fitted], truncation="only_first", max_length=self.limit)
      pairs = zip(fitted, kept["input_ids"], whole, strict=True)
      cut = [shortened or len(row) < len(full) for (_, shortened), row, full in pairs]
    rows = kept["input_ids"]
    types = kept.get("token_type_ids") or [[0] * len(row) for row in rows]
    return Encoded([], rows, types, cut)

  def _fit(self, response: str) -> tuple[str, bool]:
    """The response, cut at the end if it leaves no token for the prompt."""
    room, kept = self.limit - self.specials - 1, response
    while len(spans := self._spans(kept)) > room:
      beyond = spans[room][0]  # where the first token begins that has no room; several may be of one character
      kept = kept[: max((end for _, end in spans if end <= beyond), default=0)]
    return kept, kept != response

  def _spans(self, text: str) -> list[tuple[int, int]]:
    """The characters of each token."""
    return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

  def collate(self, items: Sequence[Encoded], steps: int) -> Texts:
    """Each text in a row of its own."""
    _, columns = self.widths(items, steps)
    rows = [[(index, k)] for index, item in enumerate(items) for k in range(len(item.responses))]
    return make_texts([_texts(item) for item in items], rows, columns, 1, len(items))

  def widths(self, items: Sequence[Encoded], steps: int) -> tuple[int, int]:
    """No prompt of its own, and the longest prompt with its response."""
    return 0, min(bucket(max(item.width for item in items), steps), self.limit)

  def rewards(self, module, batch: Texts) -> Float[Array, "items k"]:
    """The reward of each text."""
    return module(batch, **self._how)

  def features(self, module, batch: Texts) -> Float[Array, "items k pooled"]:
    """What is left of each text before the last map."""
    return module.features(batch, **self._how)

  def lay_out(self, items: Sequence[Encoded], at_once: int, tokens: int) -> Batches:
    """Single texts by like width, of which there are many. Those that must stay together: several in a row."""
    if len(items[0].responses) == 1:
      return super().lay_out(items, at_once, tokens)
    return TextPacking([_texts(item) for item in items], at_once, tokens, batch_ways(self.mesh))

  def _units(self, items: Sequence[Encoded]) -> Iterator[tuple[int, Sequence[int], Encoded]]:
    for index, item in enumerate(items):
      for k, row in enumerate(item.responses):
        yield index, [k], Encoded([], [row], [item.types[k]], [item.cut[k]])


def _texts(item: Encoded) -> list[Text]:
  return list(map(Text, item.responses, item.types))


def _by_length(item: Encoded) -> list[list[int]]:
  """The responses, longest first, in as few parts of a few as there can be."""
  count = len(item.responses)
  order = sorted(range(count), key=lambda k: (-len(item.responses[k]), k))
  size = -(-count // -(-count // FEW))
  return [order[start : start + size] for start in range(0, count, size)]


@functools.lru_cache(maxsize=8)
def build_reward_engine(
  model: ModelHandle, mesh: Mesh, settings: RewardModel, chat_template: Path | None = None
) -> RewardEngine:
  """The engine of a reward model; equal arguments share compiled programs.

  `chat_template` is what a decoder reads conversations by, if not by that of its folder.
  """
  if isinstance(model.config, EncoderConfig):
    return EncoderEngine(model, mesh, settings)
  return DecoderEngine(model, mesh, settings, chat_template)


def check_reader(model: RewardModel, chat_template: Path | None = None) -> ModelConfig:
  """The configuration of a model that can become a reward engine, with or without a reward head.

  Raises UserError, before a device is touched, for an unknown architecture, a layout that it cannot have, missing
  weights or no way to read text.
  """
  config, folder = reward_config(model), model.path
  if isinstance(config, DecoderConfig):
    Chat.load(folder, chat_template)
  elif chat_template:
    raise UserError(f"{chat_template}: a {config.family} reads pairs of texts, by no chat template; leave it out")
  else:
    load_tokenizer(folder)
  WeightFiles(folder)
  return config


def conversation_text(messages: Conversation) -> str:
  """A conversation as plain text: one user turn as it is, several as "role: content" lines."""
  if len(messages) == 1:
    return messages[0]["content"]
  return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

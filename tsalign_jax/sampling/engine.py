"""K responses a prompt: the trunk is prefilled once, its keys are stored once, and branches grow on lanes.

The device holds a fixed number of slots. A slot is one prompt: its trunk, and some lanes that grow its K branches, a
lane taking up the next branch when one ends. When a few prompts are complete, the host takes their responses and the
next prompts move in, so no branch waits for a longer one.

    slot 0   trunk A | lane 0: branch 0 ......| branch 2 ..| branch 4 ...
                     | lane 1: branch 1 ..| branch 3 .........| (A is complete: prompt C moves in)
    slot 1   trunk B | lane 0: ...

What a branch becomes depends on its prompt, its number and the key alone, never on slots, lanes or neighbours: exactly
so among arrays of one shape, and else but for how sums are rounded.
"""

import dataclasses
import functools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from tsalign_jax.config import Sampling
from tsalign_jax.data.batching import bucket, prompts_only, round_up
from tsalign_jax.models.functional import Params
from tsalign_jax.models.heads import LanguageModel
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.parallel.mesh import batch_ways, constrain_batch, put_batch
from tsalign_jax.sampling.cache import (
  PHASE,
  Cache,
  Decode,
  Own,
  Prefill,
  batch_axis,
  constrain_cache,
  empty_cache,
  empty_own,
  empty_recent,
  end_phase,
)
from tsalign_jax.sampling.draw import BLOCK, draw
from tsalign_jax.types import Branches, Finish, UserError

NARROWEST = 32  # tokens that prompts are padded to
STEPS = 8  # of wider ones: see `bucket`
PART = 32 * BLOCK  # tokens of the vocabulary; on CPUs logits are computed for so many at a time, which caches hold
EMPTY = -1  # the prompt id of a slot that holds none


class Responses(NamedTuple):
  """Responses as the device holds them, finished or not; tokens after a response's length mean nothing."""

  tokens: Int[Array, "slots k response"]
  length: Int[Array, "slots k"]
  logprob: Float[Array, "slots k"]
  stopped: Bool[Array, "slots k"]


class Slots(NamedTuple):
  """The state of sampling. `branch` is what each lane grows, K where it rests; `draft` is how far that has come."""

  prompt_id: Int[Array, " slots"]
  trunk_length: Int[Array, " slots"]
  trunk: Cache
  last: Float[Array, "slots embed"]  # the trunk's last hidden state: what the first token of a branch is drawn from
  begun: Int[Array, " slots"]  # branches, of K
  branch: Int[Array, "slots lanes"]
  token: Int[Array, "slots lanes"]
  own: Own
  recent: Cache  # the own keys of the phase that is going on
  draft: Responses  # a row for each lane
  done: Responses  # a row for each branch


class Sampled(NamedTuple):
  """One response on the host: tokens with the end token if it came, log-probability at temperature 1, finish."""

  tokens: list[int]
  logprob: float
  finish: Finish


Prompts = Sequence[tuple[int, Sequence[int]]]  # (id, tokens)


def branch_keys(
  key: Key[Array, ""], prompt_id: Int[Array, " slots"], branch: Int[Array, "slots lanes"]
) -> Key[Array, "slots lanes"]:
  """The random key of each branch, from its prompt's own id and its number."""
  of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_id)
  return _fold(jnp.broadcast_to(of_prompt[:, None], branch.shape), branch)


_fold = jax.vmap(jax.vmap(jax.random.fold_in))


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """The sampling programs of one model, mesh and setting; compiled once for each width of prompts."""

  prepare: Callable[[Params], Params]  # parameters as the programs read them, once for all calls
  empty: Callable[[int], Slots]  # (prompt width) -> slots without prompts
  admit: Callable[..., Slots]  # (params, slots, trunks, prompt ids, source of each slot) -> slots; donates the slots
  decode: Callable[..., tuple[Slots, Array]]  # (params, slots, released, wanted, key) -> slots, which are complete
  slots: int
  lanes: int  # of each slot
  admitted: int  # prompts that may move in at once
  harvested: int  # prompts that have to be complete before others move in, while there are so many
  mesh: Mesh
  source: Path  # of the model, for messages about it

  def run(
    self, params: Params, prompts: Prompts, key: Key[Array, ""], done: Collection[int] = ()
  ) -> Iterator[list[tuple[int, list[Sampled]]]]:
    """(prompt id, its K responses) of a few prompts at a time, as they are completed.

    Prompts whose ids are in `done` are left out; what is sampled for the others is the same with and without them.
    """
    params, missing = self.prepare(params), [prompt for prompt in prompts if prompt[0] not in done]
    widths = prompt_widths([len(tokens) for _, tokens in prompts], self.slots)
    for width in sorted(set(widths.values()), reverse=True):  # the widest program first: it is the last to surprise
      waiting = deque(prompt for prompt in missing if widths[len(prompt[1])] == width)
      if waiting:
        yield from self._stream(params, waiting, width, key)

  def _stream(self, params: Params, waiting: deque, width: int, key) -> Iterator[list[tuple[int, list[Sampled]]]]:
    slots, held, harvest = self.empty(width), np.full(self.slots, EMPTY), []
    while waiting or (held != EMPTY).any():
      while waiting and (held == EMPTY).any():
        slots = self._admit(params, slots, held, waiting, width)
      wanted = min(self.harvested, len(waiting)) or self.harvested
      slots, complete = self.decode(params, slots, held == EMPTY, wanted, key)
      if harvest:
        yield harvest  # the device goes on while somebody looks at it
      (ready,) = np.nonzero(np.asarray(complete))
      responses = jax.device_get(slots.done)
      if not np.isfinite(responses.logprob[ready]).all():
        raise UserError(
          f"{self.source}: its log-probabilities are not finite; begin a run in float32, or with another model"
        )
      harvest = [(int(held[slot]), _on_host(responses, slot)) for slot in ready]
      held[ready] = EMPTY
    yield harvest

  def _admit(self, params: Params, slots: Slots, held: np.ndarray, waiting: deque, width: int) -> Slots:
    """Moves the next prompts into empty slots, on the device and in `held`."""
    source = np.full(self.slots, -1)
    moving = [(slot, waiting.popleft()) for slot in np.nonzero(held == EMPTY)[0][: min(self.admitted, len(waiting))]]
    for row, (slot, (prompt_id, _)) in enumerate(moving):
      source[slot], held[slot] = row, prompt_id
    trunks = [tokens for _, (_, tokens) in moving] + [[0]] * (self.admitted - len(moving))
    ids = np.asarray([prompt_id for _, (prompt_id, _) in moving] + [EMPTY] * (self.admitted - len(moving)))
    return self.admit(params, slots, put_batch(prompts_only(trunks, width), self.mesh), ids, source)


def prompt_widths(lengths: Sequence[int], slots: int) -> dict[int, int]:
  """The width that prompts of each length are padded to: each half of the one before or less, so that they are few.

  From the longest on, a width takes shorter prompts too until they are enough to fill the slots; too few that are left
  join the last. It is a function of all prompts, so what is left of them is padded as they were.
  """
  widths, width, count, left = {}, 0, 0, len(lengths)
  for length, prompts in sorted(Counter(lengths).items(), reverse=True):
    own = max(NARROWEST, bucket(length, STEPS))
    if not widths or (2 * own <= width and count >= slots and left >= slots):
      width, count = own, 0
    widths[length] = width
    count, left = count + prompts, left - prompts
  return widths


@functools.lru_cache(maxsize=8)
def build_sampler(model: ModelHandle, mesh: Mesh, sampling: Sampling, stop_tokens: tuple[int, ...]) -> Sampler:
  """The sampler of a model: `sampling.batch_prompts` slots, rounded up to what the mesh divides."""
  slots, harvested = round_up(sampling.batch_prompts, batch_ways(mesh)), max(1, sampling.batch_prompts // 8)
  programs = _Programs(model, mesh, sampling, stop_tokens, slots)
  return Sampler(
    programs.prepare,
    jax.jit(programs.empty, static_argnums=0),
    jax.jit(programs.admit, donate_argnums=1),
    jax.jit(programs.decode, donate_argnums=1),
    slots,
    programs.lanes,
    round_up(harvested, batch_ways(mesh)),
    harvested,
    mesh,
    model.folder,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Programs:
  """What runs on the device."""

  model: ModelHandle
  mesh: Mesh
  sampling: Sampling
  stop_tokens: tuple[int, ...]
  slots: int

  @property
  def lanes(self) -> int:
    return min(self.sampling.lanes or self.sampling.responses, self.sampling.responses)

  def prepare(self, params: Params) -> Params:
    """Parameters in the dtype that they are multiplied in: those that are in it already, as they are."""
    return {name: array.astype(self.model.dtype) for name, array in params.items()}

  def empty(self, width: int) -> Slots:
    """Slots without prompts; all lanes rest."""
    slots, lanes, k, limit = self.slots, self.lanes, self.sampling.responses, self.sampling.max_new_tokens
    cache = functools.partial(empty_cache, self.model.config, self.model.layout, dtype=self.model.dtype)
    state = Slots(
      prompt_id=jnp.full(slots, EMPTY),
      trunk_length=jnp.ones(slots, jnp.int32),
      trunk=cache(lead=(slots,), length=width),
      last=jnp.zeros((slots, self.model.config.embed), self.model.dtype),
      begun=jnp.full(slots, k),
      branch=jnp.full((slots, lanes), k),
      token=jnp.zeros((slots, lanes), jnp.int32),
      own=empty_own(self.model.config, self.model.layout, (slots, lanes), limit, self.model.dtype),
      recent=empty_recent(self.model.config, self.model.layout, (slots, lanes), self.model.dtype),
      draft=_blank((slots, lanes), limit),
      done=_blank((slots, k), limit),
    )
    return self._constrain(state)

  def admit(self, params: Params, state: Slots, batch: Branches, prompt_ids, source: Int[Array, " slots"]) -> Slots:
    """Prefills the trunks and puts trunk `source` into each slot; slots with source -1 stay as they are."""
    with jax.named_scope("prefill"):
      language_model: LanguageModel = self.model.skeleton.bind(params)
      prefill, (rows, width) = Prefill(batch, self.mesh), batch.trunk.shape
      cache = empty_cache(self.model.config, self.model.layout, (rows,), width, self.model.dtype)
      hidden, cache = language_model.model(batch.trunk, prefill.position, prefill, cache=cache, dtype=self.model.dtype)

    def move(old, new, axis=0):
      taken = jnp.expand_dims(source >= 0, [a for a in range(old.ndim) if a != axis])
      return jnp.where(taken, jnp.take(new, jnp.maximum(source, 0), axis=axis), old)

    state = state._replace(
      prompt_id=move(state.prompt_id, prompt_ids),
      trunk_length=move(state.trunk_length, batch.trunk_length),
      trunk=jax.tree.map(functools.partial(move, axis=batch_axis(cache)), state.trunk, cache),
      last=move(state.last, hidden[:, -1]),
      begun=jnp.where(source >= 0, 0, state.begun),
    )
    return self._constrain(state)

  def decode(self, params: Params, state: Slots, released: Bool[Array, " slots"], wanted, key):
    """Grows branches until `wanted` prompts are complete, or all; the released slots are empty from now on."""
    language_model: LanguageModel = self.model.skeleton.bind(params)
    grow = functools.partial(self._grow, language_model, self._in_parts(language_model.head()), key)
    state = state._replace(prompt_id=jnp.where(released, EMPTY, state.prompt_id))

    def goes_on(state: Slots):
      complete, occupied = self._complete(state), state.prompt_id != EMPTY
      return (complete.sum() < wanted) & (occupied & ~complete).any()

    def phase(state: Slots) -> Slots:
      state = jax.lax.fori_loop(0, PHASE, grow, self._begin(self._book(state)))
      grown = jnp.where(state.branch < self.sampling.responses, state.draft.length, 0)
      return state._replace(own=end_phase(state.own, state.recent, grown))

    with jax.named_scope("decode"):
      state = self._book(jax.lax.while_loop(goes_on, phase, state))
    return self._constrain(state), self._complete(state)

  def _in_parts(self, head: Float[Array, "embed vocab"]) -> list[Float[Array, "embed part"]]:
    """The vocabulary projection in the parts that `draw` gets logits of: one, unless layers are apart for a CPU."""
    vocab = head.shape[1]
    size = PART if self.model.layout == "unrolled" else vocab
    return [head[:, start : start + size] for start in range(0, vocab, size)]

  def _ended(self, state: Slots) -> Bool[Array, "slots lanes"]:
    return state.draft.stopped | (state.draft.length >= self.sampling.max_new_tokens)

  def _complete(self, state: Slots) -> Bool[Array, " slots"]:
    k = self.sampling.responses
    resting = ((state.branch == k) | self._ended(state)).all(-1)
    return (state.prompt_id != EMPTY) & (state.begun == k) & resting

  def _book(self, state: Slots) -> Slots:
    """Moves what lanes have ended from `draft` to `done`; those lanes rest."""
    ended, k = self._ended(state), self.sampling.responses
    from_lane = ended[:, None] & (state.branch[:, None] == jnp.arange(k)[:, None])  # [slots, k, lanes]
    lane, found = jnp.argmax(from_lane, axis=-1), from_lane.any(-1)

    def move(old, new):
      tail = [None] * (new.ndim - 2)
      moved = jnp.take_along_axis(new, lane[:, :, *tail], axis=1)
      return jnp.where(found[:, :, *tail], moved, old)

    done = jax.tree.map(move, state.done, state.draft)
    return state._replace(done=done, branch=jnp.where(ended, k, state.branch))

  def _begin(self, state: Slots) -> Slots:
    """Gives resting lanes the next branches of their prompt, as long as there are any."""
    rests, k = state.branch == self.sampling.responses, self.sampling.responses
    following = state.begun[:, None] + jnp.cumsum(rests, axis=1) - 1
    draft = jax.tree.map(
      lambda blank, old: jnp.where(rests[:, :, *[None] * (old.ndim - 2)], blank, old),
      _blank(rests.shape, self.sampling.max_new_tokens),
      state.draft,
    )
    return state._replace(
      branch=jnp.where(rests, jnp.minimum(following, k), state.branch),
      begun=jnp.minimum(state.begun + rests.sum(1), k),
      draft=draft,
    )

  def _grow(self, language_model: LanguageModel, head, key, step: Int[Array, ""], state: Slots) -> Slots:
    """One more token for every branch that goes on; `step` counts from the beginning of the phase."""
    draft = state.draft
    grows = (state.branch < self.sampling.responses) & ~self._ended(state)
    length = jnp.where(grows, draft.length, 0)
    attend = Decode(state.trunk, state.own, state.trunk_length, length, step)
    hidden, recent = language_model.model(
      state.token, attend.position, attend, cache=state.recent, dtype=self.model.dtype
    )
    hidden = jnp.where((draft.length == 0)[..., None], state.last[:, None], hidden)
    keys = _fold(branch_keys(key, state.prompt_id, state.branch), draft.length)
    # Rows in one axis: TPUs tile the last two, and a few lanes a slot would be padded to as many as a tile has.
    rows = constrain_batch(hidden, self.mesh).reshape(-1, hidden.shape[-1])
    drawn = draw([language_model.logits(rows, part) for part in head], keys.reshape(-1), self.sampling)
    token, logprob = (array.reshape(grows.shape) for array in drawn)
    token = jnp.where(grows, token, 0)
    here = grows[..., None] & (jnp.arange(self.sampling.max_new_tokens) == draft.length[..., None])
    draft = Responses(
      tokens=jnp.where(here, token[..., None], draft.tokens),
      length=draft.length + grows,
      logprob=draft.logprob + jnp.where(grows, logprob, 0.0),
      stopped=draft.stopped | grows & jnp.isin(token, jnp.asarray(self.stop_tokens, jnp.int32)),
    )
    return state._replace(token=token, recent=recent, draft=draft)

  def _constrain(self, state: Slots) -> Slots:
    """The state where the rules of the mesh want it, so that it can be donated from call to call."""
    caches = {name: constrain_cache(getattr(state, name), self.mesh) for name in ("trunk", "recent")}
    own = tuple(constrain_cache(segment, self.mesh) for segment in state.own)
    rest = {name: value for name, value in state._asdict().items() if name not in {"own", *caches}}
    rows = jax.tree.map(lambda array: constrain_batch(array, self.mesh), rest)
    return Slots(own=own, **caches, **rows)


def _blank(shape: tuple[int, int], limit: int) -> Responses:
  zeros = jnp.zeros(shape, jnp.int32)
  return Responses(jnp.zeros((*shape, limit), jnp.int32), zeros, jnp.zeros(shape), jnp.zeros(shape, bool))


def _on_host(responses: Responses, slot: int) -> list[Sampled]:
  """The K responses of one slot as host lists."""
  tokens, length, logprob, stopped = (array[slot] for array in responses)
  return [
    Sampled(row[:size].tolist(), float(score), Finish.STOP if stop else Finish.LENGTH)
    for row, size, score, stop in zip(tokens, length, logprob, stopped, strict=True)
  ]

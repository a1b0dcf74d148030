"""K responses a prompt: the trunk is prefilled once, its keys are stored once, and the branches grow together."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from tsalign_jax.config import Sampling
from tsalign_jax.data.batching import prompts_only, round_up
from tsalign_jax.models.functional import Params
from tsalign_jax.models.heads import LanguageModel
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.parallel.mesh import batch_ways, constrain_batch, put_batch
from tsalign_jax.sampling.cache import Cache, Decode, Prefill, empty_cache
from tsalign_jax.sampling.draw import draw
from tsalign_jax.types import Branches, Finish

PROMPT_MULTIPLE = 32  # prompt widths are rounded up to it, which bounds the number of compilations
FILLER = -1  # the prompt id of rows that fill up a batch; they are finished from the start


class Responses(NamedTuple):
  """What a sampling program returns; tokens after a response's length are zeros."""

  tokens: Int[Array, "batch k response"]
  length: Int[Array, "batch k"]
  logprob: Float[Array, "batch k"]
  stopped: Bool[Array, "batch k"]


class Sampled(NamedTuple):
  """One response on the host: tokens with the end token if it came, log-probability at temperature 1, finish."""

  tokens: list[int]
  logprob: float
  finish: Finish


class _Progress(NamedTuple):
  """The state of the decoding loop after `step` tokens a branch."""

  step: Int[Array, ""]
  current: Int[Array, "batch k"]
  out: Responses
  cache: Cache


def branch_keys(key: Key[Array, ""], prompt_ids: Int[Array, "batch"], k: int) -> Key[Array, "batch k"]:
  """One random key a branch, from the prompt's own id: who else is in the batch changes nothing."""
  of_prompt = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
  return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_prompt, jnp.arange(k))


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """The sampling program of one model, mesh and setting; compiled once for each width of prompts."""

  program: Callable[[Params, Branches, Int[Array, "batch"], Key[Array, ""]], Responses]
  rows: int
  k: int
  mesh: Mesh

  def run(
    self, params: Params, groups: Iterable[Sequence[tuple[int, Sequence[int]]]], key: Key[Array, ""]
  ) -> Iterator[list[list[Sampled]]]:
    """For each group of (prompt id, prompt tokens), K responses to each of its prompts."""
    for group in groups:
      width = round_up(max(len(tokens) for _, tokens in group), PROMPT_MULTIPLE)
      filler = [(FILLER, [0])] * (self.rows - len(group))
      ids, trunks = zip(*group, *filler, strict=True)
      batch = put_batch(prompts_only(trunks, width), self.mesh)
      responses = self.program(params, batch, put_batch(np.asarray(ids), self.mesh), key)
      yield _harvest(jax.device_get(responses), len(group))


@functools.lru_cache(maxsize=8)
def build_sampler(model: ModelHandle, mesh: Mesh, sampling: Sampling, stop_tokens: tuple[int, ...]) -> Sampler:
  """The sampler of a model: `sampling.batch_prompts` prompts at once, rounded up to what the mesh divides."""
  rows = round_up(sampling.batch_prompts, batch_ways(mesh))

  @jax.jit
  def program(params: Params, batch: Branches, prompt_ids, key) -> Responses:
    params = jax.tree.map(lambda array: array.astype(model.dtype), params)
    return _generate(params, batch, prompt_ids, key, model, mesh, sampling, jnp.asarray(stop_tokens))

  return Sampler(program, rows, sampling.responses, mesh)


def _generate(
  params, batch: Branches, prompt_ids, key, model: ModelHandle, mesh, sampling: Sampling, stop_tokens
) -> Responses:
  language_model: LanguageModel = model.skeleton.bind(params)
  head = language_model.head(model.dtype)
  keys = branch_keys(key, prompt_ids, sampling.responses)
  shape = keys.shape
  limit = sampling.max_new_tokens
  idle = jnp.broadcast_to((prompt_ids == FILLER)[:, None], shape)

  def choose(hidden, progress: _Progress) -> _Progress:
    """Draws the token at `step` for every branch that goes on, and books it."""
    # Rows in one axis: TPUs tile the last two, and a few rows a prompt would be padded to as many as a tile has.
    rows = constrain_batch(hidden, mesh).reshape(-1, hidden.shape[-1])
    logits = language_model.logits(rows, head)
    step, out = progress.step, progress.out
    token = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), step), sampling)
    logprob = jnp.take_along_axis(logits, token[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)
    token, logprob = token.reshape(shape), logprob.reshape(shape)
    going = ~out.stopped
    token = jnp.where(going, token, 0)
    out = Responses(
      tokens=jax.lax.dynamic_update_index_in_dim(out.tokens, token, step, axis=2),
      length=out.length + going,
      logprob=out.logprob + jnp.where(going, logprob, 0.0),
      stopped=out.stopped | jnp.isin(token, stop_tokens) & going,
    )
    return _Progress(step + 1, token, out, progress.cache)

  def advance(progress: _Progress) -> _Progress:
    attend = Decode(batch, trunk, shape[1], limit, progress.step - 1)
    hidden, cache = language_model.model(
      progress.current, attend.query_position[..., 0], attend, cache=progress.cache, dtype=model.dtype
    )
    return choose(hidden, progress._replace(cache=cache))

  with jax.named_scope("prefill"):
    prefill = Prefill(batch, mesh)
    trunk = empty_cache(model.config, model.layout, shape[:1], batch.trunk.shape[1], model.dtype)
    hidden, trunk = language_model.model(batch.trunk, prefill.position, prefill, cache=trunk, dtype=model.dtype)
  start = Responses(
    jnp.zeros((*shape, limit), jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), idle
  )
  own = empty_cache(model.config, model.layout, shape, limit, model.dtype)
  last = jnp.broadcast_to(hidden[:, -1:], (*shape, hidden.shape[-1]))
  progress = choose(last, _Progress(jnp.int32(0), jnp.zeros(shape, jnp.int32), start, own))
  with jax.named_scope("decode"):
    return jax.lax.while_loop(lambda p: (p.step < limit) & ~p.out.stopped.all(), advance, progress).out


def _harvest(responses: Responses, rows: int) -> list[list[Sampled]]:
  """The responses of the first `rows` prompts as host lists."""
  out = []
  for row in range(rows):
    branches = []
    for k in range(responses.tokens.shape[1]):
      tokens = responses.tokens[row, k, : responses.length[row, k]].tolist()
      finish = Finish.STOP if responses.stopped[row, k] else Finish.LENGTH
      branches.append(Sampled(tokens, float(responses.logprob[row, k]), finish))
    out.append(branches)
  return out

"""Attention of branch tokens to [their shared trunk | their own branch], without a key for any sibling.

Here it is plain XLA; on TPUs whole batches go to one kernel instead (see `ops.splash`), and on NVIDIA GPUs packed rows
and trunks to another (see `ops.fused`).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.ops import fused, splash
from tsalign_jax.ops.einsum import heads_first, soft_cap, transposed, wide_matmul
from tsalign_jax.ops.masking import Masking
from tsalign_jax.types import Branches, Packed

BLOCK = 128  # queries of a row that are computed together
MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN


class Keys(NamedTuple):
  """Keys and values with the position of each and whether it is a real token.

  The trunk has no K axis: its keys and values exist once for all the branches of a prompt. Both are laid out as
  batched matrix products read them, keys with head_dim before length: a cache in this layout is never transposed.
  """

  key: Float[Array, "batch *k kv_heads head_dim length"]
  value: Float[Array, "batch *k kv_heads length head_dim"]
  position: Int[Array, "batch *k length"]
  valid: Bool[Array, "batch *k length"]
  seen: Bool[Array, ""] | None = None  # where it is given and False, nothing is visible, and nothing is read


def attend(
  query: Float[Array, "batch k length heads head_dim"],
  position: Int[Array, "batch k length"],
  own: Sequence[Keys],
  trunk: Keys,
  masking: Masking,
) -> Float[Array, "batch k length heads head_dim"]:
  """Softmax attention of each query over its trunk and its own branch, causal by position.

  The parts are met apart and joined in the softmax, so the trunk's keys are read once for all branches, and nothing
  is copied to make one long row of keys.
  """
  batch, k, length, _, head_dim = query.shape
  kv_heads = own[0].key.shape[2]
  grouped = query.reshape(batch, k, length, kv_heads, -1)
  rows = heads_first(grouped).reshape(batch, k, kv_heads, -1, head_dim)  # rows that meet the same keys
  parts = [_meet_if_seen(rows, position, keys, masking) for keys in own]
  # The trunk's keys are met by the queries of all its branches at once.
  visible = _visible(position, trunk, masking).reshape(batch, k * length, -1)
  by_trunk = jnp.swapaxes(rows, 1, 2).reshape(batch, kv_heads, -1, head_dim)
  met = meet(by_trunk, trunk.key, trunk.value, visible, masking.scale, masking.softcap)
  apart = (array.reshape(batch, kv_heads, k, -1, *array.shape[3:]) for array in met)
  parts.append(Met(*(jnp.swapaxes(array, 1, 2) for array in apart)))
  out = functools.reduce(_join, parts).normalised()
  out = jnp.swapaxes(out.reshape(batch, k, kv_heads, length, -1, head_dim), 2, 3)
  return out.reshape(query.shape).astype(query.dtype)


class Met(NamedTuple):
  """What rows of queries take from some keys: values summed with weights exp(logit - highest), and these weights."""

  out: Float[Array, "*batch rows head_dim"]
  total: Float[Array, "*batch rows"]
  highest: Float[Array, "*batch rows"]

  def normalised(self) -> Float[Array, "*batch rows head_dim"]:
    """The softmax-weighted mean of the values; zeros where nothing was visible."""
    return self.out / jnp.maximum(self.total, 1e-30)[..., None]


def meet(
  rows: Float[Array, "*batch queries head_dim"],
  key: Float[Array, "*batch head_dim length"],
  value: Float[Array, "*batch length head_dim"],
  visible: Bool[Array, "*#batch #steps length"],
  scale: float,
  softcap: float | None = None,
) -> Met:
  """What queries take from some keys. Where several heads share a key, each step of `visible` is so many queries."""
  logits = soft_cap(wide_matmul(rows, key) * scale, softcap)
  by_step = logits.reshape(*logits.shape[:-2], visible.shape[-2], -1, logits.shape[-1])
  logits = jnp.where(visible[..., None, :, None, :], by_step, MASKED).reshape(logits.shape)
  highest = jax.lax.stop_gradient(jnp.maximum(logits.max(-1), MASKED / 2))
  weights, total = _weigh(value.dtype, logits - highest[..., None])
  return Met(wide_matmul(weights, value), total, highest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(dtype, logits: Float[Array, "*rows keys"]) -> tuple[Float[Array, "*rows keys"], Float[Array, "*rows"]]:
  """exp(logits), rounded to a dtype, and their sum in float32; the backward pass keeps nothing but the rounded ones."""
  return _weigh_forward(dtype, logits)[0]


def _weigh_forward(dtype, logits):
  weights = jnp.exp(logits)
  rounded = weights.astype(dtype)
  return (rounded, weights.sum(-1)), rounded


def _weigh_backward(dtype, rounded, cotangents):
  into_weights, into_total = cotangents
  return (rounded.astype(jnp.float32) * (into_weights.astype(jnp.float32) + into_total[..., None]),)


_weigh.defvjp(_weigh_forward, _weigh_backward)


def _meet_if_seen(rows, position, keys: Keys, masking: Masking) -> Met:
  def seen(rows):
    return meet(rows, keys.key, keys.value, _visible(position, keys, masking), masking.scale, masking.softcap)

  def nothing(rows):
    total = jnp.zeros(rows.shape[:-1])
    return Met(jnp.zeros(rows.shape), total, total + MASKED / 2)

  return seen(rows) if keys.seen is None else jax.lax.cond(keys.seen, seen, nothing, rows)


def _join(a: Met, b: Met) -> Met:
  """Both sets of keys in one softmax."""
  highest = jnp.maximum(a.highest, b.highest)
  of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
  out = a.out * of_a[..., None] + b.out * of_b[..., None]
  return Met(out, a.total * of_a + b.total * of_b, highest)


def _visible(position, keys: Keys, masking: Masking) -> Bool[Array, "batch k query key"]:
  key_position, valid = keys.position, keys.valid
  if key_position.ndim == 2:
    key_position, valid = key_position[:, None], valid[:, None]
  distance = position[..., :, None] - key_position[..., None, :]
  visible = valid[..., None, :] & (distance >= 0)
  return visible if (window := masking.window) is None else visible & (distance < window)


class TrunkAndBranches:
  """Attention over a whole `Branches` batch: what prompts are read with, and what scoring attends with.

  Tokens come as [batch, prompt + k * response], the trunk first; the callers of `attend` never see a mask. `mesh` is
  the one that the program runs on, which decides how: on TPUs by a kernel that needs to know it.
  """

  def __init__(self, batch: Branches, mesh: Mesh | None = None):
    self.mesh = mesh
    self.shape = batch.branches.shape
    self.trunk_length = batch.trunk_length
    self.prompt = batch.trunk.shape[1]
    self.positions = self.prompt + self.shape[2]
    self.trunk_mask, self.branch_mask = batch.trunk_mask, batch.branch_mask
    self.trunk_position, self.branch_position = positions(batch)

  def __call__(self, query, key, value, *, masking: Masking, layer, cache):
    """The attention output [batch, tokens, heads, head_dim], and the cache as it came (there is none to keep)."""
    if splash.applies(self.mesh, query.dtype):
      columns = splash.Columns(self.prompt, self.shape[2])
      return splash.attend_tokens(query, key, value, self.trunk_length, columns, masking, self.mesh), cache
    of_trunk = [array[:, : self.prompt] for array in (query, key, value)]
    trunk = Keys(*lay_out(*of_trunk[1:]), self.trunk_position, self.trunk_mask)
    visible = _visible(self.trunk_position[:, None], trunk, masking)[:, 0]
    out = attend_rows(*of_trunk, visible, masking, self.mesh)
    if self.shape[1]:
      branch = [self._branches(array) for array in (query, key, value)]
      own = Keys(*lay_out(*branch[1:]), self.branch_position, self.branch_mask)
      branch_out = attend(branch[0], self.branch_position, [own], trunk, masking)
      out = jnp.concatenate([out, branch_out.reshape(out.shape[0], -1, *out.shape[2:])], axis=1)
    return out, cache

  def _branches(self, array):
    return array[:, self.prompt :].reshape(*self.shape, *array.shape[2:])


class PackedRows:
  """Attention over a `Packed` batch: what training attends with, and scoring of few responses.

  On TPUs a kernel skips all that is not seen; elsewhere see `attend_rows`.
  """

  def __init__(self, batch: Packed, mesh: Mesh | None = None):
    self.mesh = mesh
    self.positions = batch.tokens.shape[1]
    column = jnp.arange(self.positions)
    own, trunk = batch.branch[:, :, None] == batch.branch[:, None], batch.branch[:, None] == 0
    self.visible = (column[:, None] >= column) & (batch.item[:, :, None] == batch.item[:, None]) & (own | trunk)
    self.position = batch.position

  def __call__(self, query, key, value, *, masking: Masking, layer, cache):
    """The attention output [rows, columns, heads, head_dim], and the cache as it came (there is none to keep)."""
    if splash.applies(self.mesh, query.dtype):
      return splash.attend_packed(query, key, value, self.visible, self.position, masking, self.mesh), cache
    visible = self.visible
    if (window := masking.window) is not None:
      visible = visible & (self.position[:, :, None] - self.position[:, None] < window)
    return attend_rows(query, key, value, visible, masking, self.mesh), cache


def attend_rows(
  query: Float[Array, "rows columns heads head_dim"],
  key: Float[Array, "rows columns kv_heads head_dim"],
  value: Float[Array, "rows columns kv_heads head_dim"],
  visible: Bool[Array, "rows columns columns"],
  masking: Masking,
  mesh: Mesh | None,
) -> Float[Array, "rows columns heads head_dim"]:
  """Softmax attention of each token over what is visible to it, of the columns up to its own.

  Queries go in blocks, each with the keys before its end, so that next to nothing is computed of what comes later, and
  the weights of one block are all that is held. On NVIDIA GPUs a kernel holds none.
  """
  rows, columns, _, head_dim = query.shape
  if fused.applies(mesh, query.dtype, head_dim, masking):
    return fused.attend(query, key, value, visible, masking.scale, mesh)
  kv_heads = key.shape[2]
  key, value = lay_out(key, value)
  grouped = heads_first(query.reshape(rows, columns, kv_heads, -1))
  ends = (*range(BLOCK, columns, BLOCK), columns)
  blocks, keys, values = jnp.split(grouped, ends[:-1], axis=2), _up_to(ends, 3, key), _up_to(ends, 2, value)
  parts = []
  for block, key, value, end in zip(blocks, keys, values, ends, strict=True):
    size = block.shape[2]
    seen = visible[:, end - size : end, :end]
    met = meet(block.reshape(rows, kv_heads, -1, head_dim), key, value, seen, masking.scale, masking.softcap)
    parts.append(met.normalised().reshape(rows, kv_heads, size, -1, head_dim))
  out = jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)
  return out.reshape(query.shape).astype(query.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _up_to(ends: tuple[int, ...], axis: int, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
  """What x holds before each of the ends, of which the last is its own.

  Its gradient is summed in float32, each stretch between two ends apart. XLA's own would add arrays of the whole size,
  rounded each time, and on CPUs would do so within the loop that lays the sum out anew.
  """
  return [jax.lax.slice_in_dim(x, 0, end, axis=axis) for end in ends]


def _up_to_forward(ends, axis, x):
  return _up_to(ends, axis, x), None


def _up_to_backward(ends, axis, _, cotangents):
  stretches = []
  for first, (start, end) in enumerate(itertools.pairwise((0, *ends))):
    parts = (jax.lax.slice_in_dim(each, start, end, axis=axis) for each in cotangents[first:])
    stretches.append(sum(part.astype(jnp.float32) for part in parts).astype(cotangents[0].dtype))
  return (jnp.concatenate(stretches, axis),)


_up_to.defvjp(_up_to_forward, _up_to_backward)


def lay_out(
  key: Float[Array, "batch *k length heads head_dim"], value: Float[Array, "batch *k length heads head_dim"]
) -> tuple[Float[Array, "batch *k heads head_dim length"], Float[Array, "batch *k heads length head_dim"]]:
  """Keys and values as `Keys` and caches hold them."""
  *batch, length, heads, head_dim = key.shape
  by_column = transposed(key.reshape(*batch, length, -1))
  return by_column.reshape(*batch, heads, head_dim, length), heads_first(value)


def positions(batch: Branches) -> tuple[Int[Array, "batch prompt"], Int[Array, "batch k response"]]:
  """Positions of trunk and branch tokens, counted from the first real token of the trunk (padding gets 0)."""
  prompt, response = batch.trunk.shape[1], batch.branches.shape[2]
  trunk = jnp.arange(prompt) - (prompt - batch.trunk_length[:, None])
  branch = jnp.broadcast_to(jnp.arange(response), batch.branches.shape) + batch.trunk_length[:, None, None]
  return jnp.maximum(trunk, 0), branch


def flatten(batch: Branches) -> tuple[Int[Array, "batch tokens"], Int[Array, "batch tokens"]]:
  """Tokens and positions as the decoder reads them: [batch, prompt + k * response]."""
  trunk_position, branch_position = positions(batch)
  rows = batch.trunk.shape[0]
  tokens = jnp.concatenate([batch.trunk, batch.branches.reshape(rows, -1)], axis=1)
  return tokens, jnp.concatenate([trunk_position, branch_position.reshape(rows, -1)], axis=1)

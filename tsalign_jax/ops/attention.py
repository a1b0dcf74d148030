"""Attention of branch tokens to [their shared trunk | their own branch], without a key for any sibling.

Here it is plain XLA; on TPUs whole batches go to one kernel instead (see `ops.splash`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.ops import splash
from tsalign_jax.ops.einsum import wide_einsum
from tsalign_jax.ops.masking import Masking
from tsalign_jax.types import Branches

MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN


class Keys(NamedTuple):
  """Keys and values with the position of each and whether it is a real token.

  The trunk has no K axis: its keys and values exist once for all the branches of a prompt. Heads come before
  length, which is how batched matrix products read them: a cache in this layout is never transposed.
  """

  key: Float[Array, "batch *k kv_heads length head_dim"]
  value: Float[Array, "batch *k kv_heads length head_dim"]
  position: Int[Array, "batch *k length"]
  valid: Bool[Array, "batch *k length"]


def attend(
  query: Float[Array, "batch k length heads head_dim"],
  position: Int[Array, "batch k length"],
  own: Keys,
  trunk: Keys | None,
  masking: Masking,
) -> Float[Array, "batch k length heads head_dim"]:
  """Softmax attention of each query over its trunk and its own branch, causal by position.

  The two parts are computed apart and joined in the softmax, so the trunk's keys are read once for all branches
  and nothing is copied to make one long row of keys.
  """
  batch, k, length, _, head_dim = query.shape
  grouped = query.reshape(batch, k, length, own.key.shape[2], -1, head_dim)
  own_logits = _cap(wide_einsum("bkqhgd,bkhsd->bkhqgs", grouped, own.key), masking)
  own_logits = jnp.where(_visible(position, own, masking)[:, :, None, :, None], own_logits, MASKED)
  highest = jnp.maximum(own_logits.max(-1), MASKED / 2)
  if trunk is not None:
    trunk_logits = _cap(wide_einsum("bkqhgd,bhsd->bhkqgs", grouped, trunk.key), masking)
    trunk_logits = jnp.where(_visible(position, trunk, masking)[:, None, :, :, None], trunk_logits, MASKED)
    highest = jnp.maximum(highest, jnp.moveaxis(trunk_logits.max(-1), 1, 2))
  highest = jax.lax.stop_gradient(highest)
  weights = jnp.exp(own_logits - highest[..., None])
  total = weights.sum(-1)
  out = wide_einsum("bkhqgs,bkhsd->bkqhgd", weights.astype(own.value.dtype), own.value)
  if trunk is not None:
    weights = jnp.exp(trunk_logits - jnp.moveaxis(highest, 2, 1)[..., None])
    total = total + jnp.moveaxis(weights.sum(-1), 1, 2)
    out = out + wide_einsum("bhkqgs,bhsd->bkqhgd", weights.astype(trunk.value.dtype), trunk.value)
  out = out / jnp.maximum(jnp.moveaxis(total, 2, 3)[..., None], 1e-30)
  return out.reshape(query.shape).astype(query.dtype)


def _cap(logits, masking: Masking):
  logits = logits * masking.scale
  return logits if masking.softcap is None else jnp.tanh(logits / masking.softcap) * masking.softcap


def _visible(position, keys: Keys, masking: Masking) -> Bool[Array, "batch k query key"]:
  key_position, valid = keys.position, keys.valid
  if key_position.ndim == 2:
    key_position, valid = key_position[:, None], valid[:, None]
  distance = position[..., :, None] - key_position[..., None, :]
  visible = valid[..., None, :] & (distance >= 0)
  return visible if (window := masking.window) is None else visible & (distance < window)


class TrunkAndBranches:
  """Attention over a whole `Branches` batch: what scoring and training attend with.

  Tokens come as [batch, prompt + k * response], the trunk first; the callers of `attend` never see a mask. `mesh` is
  the one that the program runs on, which decides how: on TPUs by a kernel that needs to know it.
  """

  def __init__(self, batch: Branches, mesh: Mesh | None = None):
    self.mesh = mesh
    self.shape = batch.branches.shape
    self.trunk_length = batch.trunk_length
    self.prompt = batch.trunk.shape[1]
    self.trunk_mask, self.branch_mask = batch.trunk_mask, batch.branch_mask
    self.trunk_position, self.branch_position = positions(batch)

  def __call__(self, query, key, value, *, masking: Masking, layer, cache):
    """The attention output [batch, tokens, heads, head_dim], and the cache as it came (there is none to keep)."""
    if splash.applies(self.mesh, query.dtype):
      columns = splash.Columns(self.prompt, self.shape[2])
      return splash.attend_tokens(query, key, value, self.trunk_length, columns, masking, self.mesh), cache
    trunk = Keys(
      heads_first(key[:, : self.prompt]), heads_first(value[:, : self.prompt]), self.trunk_position, self.trunk_mask
    )
    out = attend_trunk(query[:, : self.prompt], trunk, masking)
    if self.shape[1]:
      branch = [self._branches(array) for array in (query, key, value)]
      own = Keys(heads_first(branch[1]), heads_first(branch[2]), self.branch_position, self.branch_mask)
      branch_out = attend(branch[0], self.branch_position, own, trunk, masking)
      out = jnp.concatenate([out, branch_out.reshape(out.shape[0], -1, *out.shape[2:])], axis=1)
    return out, cache

  def _branches(self, array):
    return array[:, self.prompt :].reshape(*self.shape, *array.shape[2:])


def heads_first(array: Float[Array, "batch *k length heads head_dim"]):
  """Keys or values as a cache holds them: [batch, *k, heads, length, head_dim]."""
  return jnp.swapaxes(array, -3, -2)


def attend_trunk(query: Float[Array, "batch prompt heads head_dim"], trunk: Keys, masking: Masking):
  """Causal self-attention of the trunk: one branch that has no trunk of its own."""
  own = Keys(*(array[:, None] for array in trunk))
  return attend(query[:, None], own.position, own, None, masking)[:, 0]


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

"""Key-value caches of one or of stacked layers, and the attention that fills and reads them.

A cache is a tuple with one entry a layer (unrolled layers), or one pytree whose arrays lead with a layer axis
(stacked layers: the scan carries it whole, so that no step copies it).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.decoder import Layout
from tsalign_jax.ops.attention import Keys, TrunkAndBranches, attend, heads_first, positions
from tsalign_jax.ops.masking import Masking
from tsalign_jax.types import Branches


class KV(NamedTuple):
  """Keys and values of some tokens, heads before length."""

  key: Float[Array, "batch *k kv_heads length head_dim"]
  value: Float[Array, "batch *k kv_heads length head_dim"]


Cache = tuple[KV, ...] | KV


def empty_cache(config: DecoderConfig, layout: Layout, lead: tuple[int, ...], length: int, dtype) -> Cache:
  """A cache of zeros for every layer; `lead` is (batch,) for trunks and (batch, k) for branches."""
  shape = (*lead, config.kv_heads, length, config.head_dim)
  if layout == "stacked":
    return KV(*(jnp.zeros((config.layers, *shape), dtype) for _ in range(2)))
  return tuple(KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def read(cache: Cache, layer) -> KV:
  """The keys and values of one layer."""
  return cache[layer] if not isinstance(cache, KV) else KV(*(array[layer] for array in cache))


def write(cache: Cache, layer, entry: KV) -> Cache:
  """The cache with one layer's entry replaced."""
  if not isinstance(cache, KV):
    return (*cache[:layer], entry, *cache[layer + 1 :])
  return KV(*(array.at[layer].set(new) for array, new in zip(cache, entry, strict=True)))


class Prefill:
  """Self-attention of trunks without branches, that leaves their keys and values in the cache."""

  def __init__(self, batch: Branches, mesh: Mesh | None = None):
    self.attend = TrunkAndBranches(batch, mesh)
    self.position = self.attend.trunk_position

  def __call__(self, query, key, value, *, masking: Masking, layer, cache: Cache):
    """The attention output [batch, prompt, heads, head_dim] and the filled cache."""
    out, _ = self.attend(query, key, value, masking=masking, layer=layer, cache=None)
    entry = KV(heads_first(key), heads_first(value))
    return out, write(cache, layer, jax.tree.map(lambda new, old: new.astype(old.dtype), entry, read(cache, layer)))


class Decode:
  """Attention of one new token a branch to [shared trunk | own branch up to now]."""

  def __init__(self, batch: Branches, trunk: Cache, k: int, length: int, step: Int[Array, ""]):
    rows = batch.trunk.shape[0]
    self.trunk, self.step, self.k = trunk, step, k
    self.trunk_mask = batch.trunk_mask
    self.trunk_position, _ = positions(batch)
    columns = jnp.broadcast_to(jnp.arange(length), (rows, k, length))
    self.valid = columns <= step
    self.position = columns + batch.trunk_length[:, None, None]
    self.query_position = jnp.broadcast_to(batch.trunk_length[:, None, None] + step, (rows, k, 1))

  def __call__(self, query, key, value, *, masking: Masking, layer, cache: Cache):
    """The attention output [batch, k, heads, head_dim] and the cache with this step's keys and values."""
    cache = self._put(cache, layer, KV(key, value))
    own = Keys(*read(cache, layer), self.position, self.valid)
    trunk = Keys(*read(self.trunk, layer), self.trunk_position, self.trunk_mask)
    out = attend(query[:, :, None], self.query_position, own, trunk, masking)
    return out[:, :, 0], cache

  def _put(self, cache: Cache, layer, new: KV) -> Cache:
    if not isinstance(cache, KV):
      added = (self._put_column(old, array, ()) for old, array in zip(cache[layer], new, strict=True))
      return write(cache, layer, KV(*added))
    # Straight into the stack: a layer that is read, changed and written back moves three times the bytes.
    return KV(*(self._put_column(old, array[None], (layer,)) for old, array in zip(cache, new, strict=True)))

  def _put_column(self, old, new, layer: tuple):
    # [batch, k, heads, head_dim] into column `step` of [batch, k, heads, length, head_dim], or of a stack of these
    return jax.lax.dynamic_update_slice(old, new[..., None, :].astype(old.dtype), (*layer, 0, 0, 0, self.step, 0))

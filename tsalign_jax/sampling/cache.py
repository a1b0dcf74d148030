"""Key-value caches of one or of stacked layers, and the attention that fills and reads them.

A cache is a tuple with one entry a layer (unrolled layers), or one pytree whose arrays lead with a layer axis
(stacked layers: the scan carries it whole, so that no step copies it).

Branches differ in length, and to write one column of each would be a scatter, or a pass over the whole cache. So all
branches begin at multiples of PHASE steps: the tokens of the current phase lie in the same columns of a small cache,
`recent`, and move to their own columns in the large one, `own`, together at the end of the phase. So few columns
cannot be the last axis, which TPUs fill up to 128; the keys of `recent` keep head_dim there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.decoder import Layout
from tsalign_jax.ops.attention import Keys, TrunkAndBranches, attend, lay_out
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import constrain
from tsalign_jax.types import Branches

PHASE = 8  # tokens


class KV(NamedTuple):
  """Keys and values of some tokens, as `Keys` has them."""

  key: Float[Array, "batch *k kv_heads head_dim length"]
  value: Float[Array, "batch *k kv_heads length head_dim"]


Cache = tuple[KV, ...] | KV


def empty_cache(config: DecoderConfig, layout: Layout, lead: tuple[int, ...], length: int, dtype) -> Cache:
  """A cache of zeros for every layer; `lead` is (batch,) for trunks and (batch, k) for branches."""
  lead = (config.layers, *lead, config.kv_heads) if layout == "stacked" else (*lead, config.kv_heads)

  def layer() -> KV:
    return KV(jnp.zeros((*lead, config.head_dim, length), dtype), jnp.zeros((*lead, length, config.head_dim), dtype))

  return layer() if layout == "stacked" else tuple(layer() for _ in range(config.layers))


def empty_recent(config: DecoderConfig, layout: Layout, lead: tuple[int, ...], dtype) -> Cache:
  """As `empty_cache`, for the tokens of one phase: keys lie as values do."""
  cache = empty_cache(config, layout, lead, PHASE, dtype)
  return jax.tree.map(lambda kv: KV(_turned(kv.key), kv.value), cache, is_leaf=lambda node: isinstance(node, KV))


def read(cache: Cache, layer) -> KV:
  """The keys and values of one layer."""
  return cache[layer] if not isinstance(cache, KV) else KV(*(array[layer] for array in cache))


def write(cache: Cache, layer, entry: KV) -> Cache:
  """The cache with one layer's entry replaced."""
  if not isinstance(cache, KV):
    return (*cache[:layer], entry, *cache[layer + 1 :])
  return KV(*(array.at[layer].set(new) for array, new in zip(cache, entry, strict=True)))


def batch_axis(cache: Cache) -> int:
  """Which axis of its arrays counts rows of the batch."""
  return int(isinstance(cache, KV))


def constrain_cache(cache: Cache, mesh: Mesh) -> Cache:
  """The same cache, its rows and heads split over the mesh."""
  lead = ("layers",) * batch_axis(cache)

  def place(array):
    between = (None,) * (array.ndim - len(lead) - 4)
    return constrain(array, (*lead, "batch", *between, "kv_heads", None, None), mesh)

  return jax.tree.map(place, cache)


class Prefill:
  """Self-attention of trunks without branches, that leaves their keys and values in the cache."""

  def __init__(self, batch: Branches, mesh: Mesh | None = None):
    self.attend = TrunkAndBranches(batch, mesh)
    self.position, self.positions = self.attend.trunk_position, self.attend.positions

  def __call__(self, query, key, value, *, masking: Masking, layer, cache: Cache):
    """The attention output [batch, prompt, heads, head_dim] and the filled cache."""
    out, _ = self.attend(query, key, value, masking=masking, layer=layer, cache=None)
    entry = KV(*lay_out(key, value))
    return out, write(cache, layer, jax.tree.map(lambda new, old: new.astype(old.dtype), entry, read(cache, layer)))


class Decode:
  """Attention of one new token a lane to [the trunk it shares | its own earlier phases | this phase up to now].

  `length` is how many tokens each lane's branch has, the new one included, and 0 where there is no new one. It is the
  column of the new token, so the first column of a branch stays empty; where it is not 0, it is `offset` modulo PHASE.
  The cache that is filled is `recent`.
  """

  def __init__(
    self,
    trunk: Cache,
    own: Cache,
    trunk_length: Int[Array, " slots"],
    length: Int[Array, "slots lanes"],
    offset: Int[Array, ""],
  ):
    self.trunk, self.own, self.offset = trunk, own, offset
    before = jnp.arange(-_columns(trunk), 0) + trunk_length[:, None]
    self.trunk_position, self.trunk_mask = jnp.maximum(before, 0), before >= 0
    self.position = trunk_length[:, None] + length - 1
    self.positions = _columns(trunk) + _columns(own)
    phase = (length // PHASE * PHASE)[..., None]  # its first column
    earlier = jnp.broadcast_to(jnp.arange(_columns(own)), (*length.shape, _columns(own)))
    recent = phase + jnp.arange(PHASE)
    first = trunk_length[:, None, None] - 1  # the position of column 0
    self.own_position, self.own_mask = first + earlier, (earlier > 0) & (earlier < phase)
    self.recent_position, self.recent_mask = first + recent, (recent > 0) & (recent <= length[..., None])

  def __call__(self, query, key, value, *, masking: Masking, layer, cache: Cache):
    """The attention output [slots, lanes, heads, head_dim] and `recent` with this step's keys and values."""
    cache = self._put(cache, layer, KV(key[..., None, :], value[..., None, :]))
    recent = read(cache, layer)
    parts = (
      Keys(*read(self.own, layer), self.own_position, self.own_mask),
      Keys(_turned(recent.key), recent.value, self.recent_position, self.recent_mask),
    )
    trunk = Keys(*read(self.trunk, layer), self.trunk_position, self.trunk_mask)
    out = attend(query[:, :, None], self.position[..., None], parts, trunk, masking)
    return out[:, :, 0], cache

  def _put(self, recent: Cache, layer, new: KV) -> Cache:
    def put(old, added, start):
      return jax.lax.dynamic_update_slice(old, added.astype(old.dtype), (*start, 0, 0, 0, self.offset, 0))

    if isinstance(recent, KV):
      return KV(*(put(old, added[None], (layer,)) for old, added in zip(recent, new, strict=True)))
    return write(recent, layer, KV(*(put(old, added, ()) for old, added in zip(recent[layer], new, strict=True))))


def end_phase(own: Cache, recent: Cache, length: Int[Array, "slots lanes"]) -> Cache:
  """`own` with the columns of a phase that has ended; `length` is how many tokens each branch has by now.

  What lands in the lane of a branch that ended, or of none, is not read: the next one writes its columns first.
  """
  blocks = _columns(own) // PHASE
  there = jnp.arange(blocks) == (length // PHASE - 1)[..., None]  # [slots, lanes, blocks]

  def move(old: KV, new: KV) -> KV:
    key = old.key.reshape(*old.key.shape[:-1], blocks, PHASE)
    value = old.value.reshape(*old.value.shape[:-2], blocks, PHASE, old.value.shape[-1])
    return KV(
      jnp.where(there[:, :, None, None, :, None], _turned(new.key)[..., None, :], key).reshape(old.key.shape),
      jnp.where(there[:, :, None, :, None, None], new.value[..., None, :, :], value).reshape(old.value.shape),
    )

  return move(own, recent) if isinstance(own, KV) else tuple(map(move, own, recent))


def _turned(key):
  return jnp.swapaxes(key, -1, -2)


def _columns(cache: Cache) -> int:
  return jax.tree.leaves(cache)[-1].shape[-2]

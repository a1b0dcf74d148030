"""Key-value caches of one or of stacked layers, and the attention that fills and reads them.

A cache is a tuple with one entry a layer (unrolled layers), or one pytree whose arrays lead with a layer axis
(stacked layers: the scan carries it whole, so that no step copies it).

Branches differ in length, and to write one column of each in every step would be a scatter. So all branches begin at
multiples of PHASE steps, and the tokens of one step lie in the same column for all of them, in a small cache, `recent`.
Only when the phase ends, each lane moves it to where it belongs in a large one, `own`: to the column of a token's
number in its branch, whatever the other lanes do, so that sums over columns have the same order always. What a lane
grew before its present branch is masked. Where `own` is in several segments, those of which no branch needs anything
are not read. TPUs fill the last axis up to 128, too many for the columns of a phase: the keys of `recent` have head_dim
last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.decoder import Layout
from tsalign_jax.ops.attention import Keys, TrunkAndBranches, attend, lay_out
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import constrain
from tsalign_jax.types import Branches

PHASE = 8  # tokens
SEGMENTS = 4  # at most
SHORTEST = 64  # tokens of a segment


class KV(NamedTuple):
  """Keys and values of some tokens, as `Keys` has them."""

  key: Float[Array, "batch *k kv_heads head_dim length"]
  value: Float[Array, "batch *k kv_heads length head_dim"]


Cache = tuple[KV, ...] | KV
Own = tuple[Cache, ...]  # in segments


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


def empty_own(config: DecoderConfig, layout: Layout, lead: tuple[int, ...], length: int, dtype) -> Own:
  """Room for `length` tokens of each branch, in segments where layers are unrolled: there it pays to read few."""
  segments = max(1, min(SEGMENTS, length // SHORTEST)) if layout == "unrolled" else 1
  columns = -(-length // (segments * PHASE)) * PHASE
  return tuple(empty_cache(config, layout, lead, columns, dtype) for _ in range(segments))


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

  `length` is how many tokens each lane's branch has, the new one included, and 0 where there is no new one; where it
  is not 0, it is `step` modulo PHASE. The cache that is filled is `recent`. No key is stored for the first step of a
  branch: it takes its token from the trunk.
  """

  def __init__(
    self,
    trunk: Cache,
    own: Own,
    trunk_length: Int[Array, " slots"],
    length: Int[Array, "slots lanes"],
    step: Int[Array, ""],
  ):
    self.trunk, self.own, self.step = trunk, own, step
    before = jnp.arange(-_columns(trunk), 0) + trunk_length[:, None]
    self.trunk_position, self.trunk_mask = jnp.maximum(before, 0), before >= 0
    self.position = trunk_length[:, None] + length - 1
    columns = [_columns(segment) for segment in own]
    self.positions = _columns(trunk) + sum(columns)
    begun = (length // PHASE * PHASE)[..., None]  # tokens that the branch had when this phase began
    earlier, recent = jnp.arange(sum(columns)), begun + jnp.arange(PHASE)
    first = trunk_length[:, None, None] - 1
    ends = np.cumsum(columns)[:-1]
    self.own_position = jnp.split(first + earlier, ends, axis=-1)
    self.own_mask = jnp.split((earlier > 0) & (earlier < begun), ends, axis=-1)
    self.recent_position, self.recent_mask = first + recent, (recent > 0) & (recent <= length[..., None])

  def __call__(self, query, key, value, *, masking: Masking, layer, cache: Cache):
    """The attention output [slots, lanes, heads, head_dim] and `recent` with this step's keys and values."""
    cache = self._put(cache, layer, KV(key[..., None, :], value[..., None, :]))
    recent = read(cache, layer)
    several = len(self.own) > 1
    parts = [
      Keys(*read(segment, layer), position, mask, mask.any() if several else None)
      for segment, position, mask in zip(self.own, self.own_position, self.own_mask, strict=True)
    ]
    parts.append(Keys(_turned(recent.key), recent.value, self.recent_position, self.recent_mask))
    trunk = Keys(*read(self.trunk, layer), self.trunk_position, self.trunk_mask)
    out = attend(query[:, :, None], self.position[..., None], parts, trunk, masking)
    return out[:, :, 0], cache

  def _put(self, recent: Cache, layer, new: KV) -> Cache:
    if isinstance(recent, KV):
      start = (layer, 0, 0, 0, self.step, 0)
      return KV(*(_update(old, added[None], start) for old, added in zip(recent, new, strict=True)))
    start = (0, 0, 0, self.step, 0)
    return write(
      recent, layer, KV(*(_update(old, added, start) for old, added in zip(recent[layer], new, strict=True)))
    )


def end_phase(own: Own, recent: Cache, length: Int[Array, "slots lanes"]) -> Own:
  """`own` with the phase that ends now; `length` is how many tokens each lane's branch has, 0 where it rests."""
  first, segments = 0, []
  for segment in own:
    start = (length - 1) // PHASE * PHASE - first
    segments.append(_move(segment, recent, start) if isinstance(segment, KV) else _move_in_turn(segment, recent, start))
    first += _columns(segment)
  return tuple(segments)


def _move(segment: KV, recent: KV, start: Int[Array, "slots lanes"]) -> KV:
  """A segment with the phase of each lane at its own column; of stacked layers."""
  put = jax.vmap(jax.vmap(_put, in_axes=(1, 1, 0), out_axes=1), in_axes=(1, 1, 0), out_axes=1)
  return put(segment, KV(_turned(recent.key), recent.value), jnp.maximum(start, 0))


def _move_in_turn(segment: tuple[KV, ...], recent: tuple[KV, ...], start: Int[Array, "slots lanes"]):
  """The same of layers apart, by a loop over the lanes that belong here: for a CPU, scatters would be one each."""
  lanes, here = start.shape[1], ((start >= 0) & (start < _columns(segment))).reshape(-1)
  order = jnp.argsort(~here)

  def move(number, segment):
    at = divmod(order[number], lanes)
    of_lane = lambda array: jax.lax.dynamic_slice(array, (*at, 0, 0, 0), (1, 1, *array.shape[2:]))  # noqa: E731
    new = [KV(_turned(of_lane(each.key)), of_lane(each.value)) for each in recent]
    return tuple(_put(old, kv, start[at], at) for old, kv in zip(segment, new, strict=True))

  return jax.lax.fori_loop(0, here.sum(), move, segment)


def _put(old: KV, new: KV, start: Int[Array, ""], lead: tuple = (0,)) -> KV:
  """A phase's keys and values from column `start` on, of layers from 0 on or of one lane."""
  return KV(_update(old.key, new.key, (*lead, 0, 0, start)), _update(old.value, new.value, (*lead, 0, start, 0)))


def _update(old, new, start):
  """`jax.lax.dynamic_update_slice`, of bits: XLA's CPU backend updates no bfloat16 array in place.

  It would convert the whole of it to float32 and back.
  """
  bits = {2: jnp.uint16, 4: jnp.uint32}[old.dtype.itemsize]
  old_bits, new_bits = (jax.lax.bitcast_convert_type(array, bits) for array in (old, new.astype(old.dtype)))
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(old_bits, new_bits, start), old.dtype)


def _turned(key):
  return jnp.swapaxes(key, -1, -2)


def _columns(cache: Cache) -> int:
  return jax.tree.leaves(cache)[-1].shape[-2]

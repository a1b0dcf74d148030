"""Key-value caches of one or of stacked layers, and the attention that fills and reads them.

A cache is a tuple with one entry a layer (unrolled layers), or one pytree whose arrays lead with a layer axis
(stacked layers: the scan carries it whole, so that no step copies it).

Branches differ in length, and to write one column of each would be a scatter, or a pass over the whole cache. So all
branches begin at multiples of PHASE steps, and the tokens of one step lie in the same column for all of them: first in
a small cache, `recent`, then, from the end of the phase on, in a page of a large one, `own`. `born` says of each page
which phase it holds; what a lane grew before its present branch is masked by that. A phase takes the first page that
no branch needs any more, so the pages in use are near the beginning. Where `own` is in several segments, those of
which no branch needs anything are not read. So few columns as a phase has cannot be the last axis, which TPUs fill up
to 128; the keys of `recent` keep head_dim there.
"""

import functools
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


def pages(own: Own) -> int:
  """How many phases there is room for."""
  return sum(map(_columns, own)) // PHASE


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
  is not 0, it is `clock` modulo PHASE, and `clock` counts the steps of all branches. The cache that is filled is
  `recent`. No key is stored for the first step of a branch: it takes its token from the trunk.
  """

  def __init__(
    self,
    trunk: Cache,
    own: Own,
    born: Int[Array, " pages"],
    trunk_length: Int[Array, " slots"],
    length: Int[Array, "slots lanes"],
    clock: Int[Array, ""],
  ):
    self.trunk, self.own, self.offset = trunk, own, clock % PHASE
    before = jnp.arange(-_columns(trunk), 0) + trunk_length[:, None]
    self.trunk_position, self.trunk_mask = jnp.maximum(before, 0), before >= 0
    self.position = trunk_length[:, None] + length - 1
    self.positions = _columns(trunk) + PHASE * pages(own)
    begun = (length // PHASE * PHASE)[..., None]  # tokens that the branch had when this phase began
    page = (born - clock // PHASE)[:, None] * PHASE + jnp.arange(PHASE)
    earlier, recent = begun + page.reshape(-1), begun + jnp.arange(PHASE)
    first = trunk_length[:, None, None] - 1
    ends = np.cumsum([_columns(segment) for segment in own])[:-1]
    self.own_position = jnp.split(first + earlier, ends, axis=-1)
    self.own_mask = jnp.split(earlier > 0, ends, axis=-1)
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
      start = (layer, 0, 0, 0, self.offset, 0)
      return KV(*(_update(old, added[None], start) for old, added in zip(recent, new, strict=True)))
    start = (0, 0, 0, self.offset, 0)
    return write(
      recent, layer, KV(*(_update(old, added, start) for old, added in zip(recent[layer], new, strict=True)))
    )


def end_phase(
  own: Own, born: Int[Array, " pages"], recent: Cache, length: Int[Array, "slots lanes"], clock: Int[Array, ""]
) -> tuple[Own, Int[Array, " pages"]]:
  """`own` and `born` with the phase that ends now, at step `clock`; `length` is how many tokens each branch has."""
  phase = clock // PHASE - 1
  page = jnp.argmax(born <= phase - (length // PHASE).max())  # the first that no branch needs
  segments, first = [], 0
  for segment in own:
    put = functools.partial(_put_page, recent, page - first)
    here = (page >= first) & (page < first + pages((segment,)))
    segments.append(put(segment) if len(own) == 1 else jax.lax.cond(here, put, lambda segment: segment, segment))
    first += pages((segment,))
  return tuple(segments), born.at[page].set(phase)


def _put_page(recent: Cache, page: Int[Array, ""], segment: Cache) -> Cache:
  """A segment with the phase in one of its pages."""

  def put(old: KV, new: KV) -> KV:
    before, start = (0,) * (old.key.ndim - 2), page * PHASE
    return KV(
      _update(old.key, _turned(new.key), (*before, 0, start)), _update(old.value, new.value, (*before, start, 0))
    )

  return put(segment, recent) if isinstance(segment, KV) else tuple(map(put, segment, recent))


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

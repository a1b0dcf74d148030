"""Drawing one token a row: filters without a sort, and a draw that costs one random number a row."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from tsalign_jax.config import Sampling
from tsalign_jax.ops.einsum import sum_exp

BLOCK = 256  # tokens


def keep_top_k(probs: Float[Array, "*rows vocab"], k: int) -> Float[Array, "*rows vocab"]:
  """The k most likely tokens (and any tied with the last of them); the others become 0."""
  floor = _largest_floor(probs, lambda kept: (kept > 0).sum(-1) >= min(k, probs.shape[-1]))
  return jnp.where(probs >= floor[..., None], probs, 0.0)


def keep_top_p(probs: Float[Array, "*rows vocab"], p: float) -> Float[Array, "*rows vocab"]:
  """The smallest set of most likely tokens with at least p of all probability (Holtzman et al. 2020)."""
  total = probs.sum(-1)
  floor = _largest_floor(probs, lambda kept: kept.sum(-1) >= p * total)
  return jnp.where(probs >= floor[..., None], probs, 0.0)


def keep_min_p(probs: Float[Array, "*rows vocab"], share: float) -> Float[Array, "*rows vocab"]:
  """Tokens at least `share` times as likely as the likeliest one (Nguyen et al. 2024)."""
  return jnp.where(probs >= share * probs.max(-1, keepdims=True), probs, 0.0)


def _largest_floor(probs, enough):
  """The largest value v of each row such that the tokens with probability >= v are `enough`.

  Floats that are not negative order like their bits, so 31 halvings of an integer range find it exactly.
  """

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low + 1) // 2
    floor = jax.lax.bitcast_convert_type(middle, jnp.float32)
    ok = enough(jnp.where(probs >= floor[..., None], probs, 0.0))
    return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

  low = jnp.zeros(probs.shape[:-1], jnp.int32)
  high = jax.lax.bitcast_convert_type(probs.max(-1), jnp.int32)
  low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)


def filtered(weights: Float[Array, "*rows vocab"], sampling: Sampling) -> Float[Array, "*rows vocab"]:
  """Weights of the tokens that may be drawn: top-k, then top-p and min-p, in the order of transformers."""
  if sampling.top_k:
    weights = keep_top_k(weights, sampling.top_k)
  if sampling.top_p < 1:
    weights = keep_top_p(weights, sampling.top_p)
  if sampling.min_p:
    weights = keep_min_p(weights, sampling.min_p)
  return weights


def draw(
  logits: Sequence[Float[Array, "rows part"]], keys: Key[Array, " rows"], sampling: Sampling
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
  """One token a row, and its log-probability at temperature 1 without any filter.

  The logits come in parts of the vocabulary, all but the last of whole blocks: what is done to a part is done while
  it lies in the processor's cache. The cumulative distribution is inverted at one uniform number a row. Its sum is
  accumulated in two levels, over blocks of tokens and then inside the chosen block, because a running sum over the
  whole vocabulary costs more than several layers of a small model; nothing is normalised, because what is drawn does
  not depend on it.
  """
  temperature, plain = sampling.temperature, not (sampling.top_k or sampling.top_p < 1 or sampling.min_p)
  highest = [part.max(-1, keepdims=True) for part in logits]
  top = functools.reduce(jnp.maximum, highest)
  weights = [jnp.exp((part - high) / temperature) for part, high in zip(logits, highest, strict=True)]
  factors = [jnp.exp((high - top) / temperature) for high in highest]  # what makes the parts comparable
  if not plain:
    comparable = [part * factor for part, factor in zip(weights, factors, strict=True)]
    weights, factors = [filtered(jnp.concatenate(comparable, axis=-1), sampling)], [jnp.ones_like(top)]
  blocks = [_blocks(part) for part in weights]
  sums = [part.sum(-1) * factor for part, factor in zip(blocks, factors, strict=True)]
  ends = jnp.cumsum(jnp.concatenate(sums, axis=-1), axis=-1)
  target = jax.vmap(jax.random.uniform)(keys) * ends[:, -1]
  block, start = _first_beyond(ends, target)
  inside = _block(blocks, factors, block)
  within, _ = _first_beyond(jnp.cumsum(inside, axis=-1), target - start)
  weight = jnp.take_along_axis(inside, within[:, None], axis=-1)[:, 0]
  total = ends[:, -1]
  if not (plain and temperature == 1):
    total = sum(sum_exp(part - high) * jnp.exp(high - top)[:, 0] for part, high in zip(logits, highest, strict=True))
  return (block * BLOCK + within).astype(jnp.int32), temperature * jnp.log(weight) - jnp.log(total)


def _blocks(weights: Float[Array, "rows part"]) -> Float[Array, "rows blocks block"]:
  padded = jnp.pad(weights, [(0, 0), (0, -weights.shape[-1] % BLOCK)])
  return padded.reshape(weights.shape[0], -1, BLOCK)


def _block(parts, factors, block: Int[Array, " rows"]) -> Float[Array, "rows block"]:
  """The weights in one block of each row, counted over all parts."""
  inside, first = 0.0, 0
  for part, factor in zip(parts, factors, strict=True):
    index = block - first
    here = (index >= 0) & (index < part.shape[1])
    taken = jnp.take_along_axis(part, jnp.where(here, index, 0)[:, None, None], axis=1)[:, 0]
    inside, first = inside + jnp.where(here[:, None], taken * factor, 0.0), first + part.shape[1]
  return inside


def _first_beyond(ends, target):
  """The first index at which a running sum exceeds the target, and the sum before it.

  Where rounding puts the target at or past the last sum, the last index that adds anything: never one of weight 0.
  """
  before = jnp.pad(ends[..., :-1], [(0, 0)] * (ends.ndim - 1) + [(1, 0)])
  adds = ends > before
  last = ends.shape[-1] - 1 - jnp.argmax(adds[..., ::-1], axis=-1)
  index = jnp.minimum((ends <= target[..., None]).sum(-1), last)
  return index, jnp.take_along_axis(before, index[..., None], axis=-1)[..., 0]

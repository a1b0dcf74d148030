"""Log-probabilities of target tokens without ever holding [tokens, vocab] in float32."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.ops.einsum import soft_cap, sum_exp, transposed, wide_dot
from tsalign_jax.ops.order import after
from tsalign_jax.parallel.mesh import RULES

CHUNK = 256  # tokens
PART = 2048  # columns of the vocabulary


def token_logprobs(
  hidden: Float[Array, "tokens embed"],
  head: Float[Array, "embed vocab"],
  targets: Int[Array, " tokens"],
  *,
  softcap: float | None = None,
  chunk: int | None = CHUNK,
  part: int | None = None,
) -> Float[Array, " tokens"]:
  """log p(target) of each token, in nats and float32, computed a piece of [tokens, vocab] at a time.

  A piece is `chunk` tokens by `part` columns of the vocabulary; None takes all. Chunks are scanned, and leave a
  sharded vocabulary where it is; parts are computed one after the other, and suit the caches of a CPU. The backward
  pass computes the logits of a piece again. Products are in the dtype of `hidden`, and the gradient of a float32
  `head` is summed in float32.
  """
  of_chunk = functools.partial(_logprobs, softcap, part)
  tokens = hidden.shape[0]
  if chunk is None or chunk >= tokens:
    return of_chunk(hidden, head, targets)
  padding = -tokens % chunk
  hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
  targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)
  return jax.lax.map(lambda pair: of_chunk(pair[0], head, pair[1]), (hidden, targets)).reshape(-1)[:tokens]


def token_logprobs_of_devices(
  hidden: Float[Array, "ways tokens embed"],
  head: Float[Array, "embed vocab"],
  targets: Int[Array, "ways tokens"],
  mesh: Mesh,
  **pieces: Any,
) -> Float[Array, "ways tokens"]:
  """`token_logprobs` where every way that batches are split computes its own tokens, in `pieces` as there.

  Each gathers the head once. Left to the partitioner, the scan would be over chunks of all ways, one after the other,
  and each would wait for all devices.
  """

  def of_device(hidden, head, targets):
    return token_logprobs(hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), **pieces).reshape(
      targets.shape
    )

  if len(targets) == 1:
    return of_device(hidden, head, targets)
  batch, axes = PartitionSpec(RULES["batch"]), set(RULES["batch"])
  # Gradients of the head are of each way alone until shard_map adds them up, which its type check does not allow for.
  by_way = functools.partial(jax.shard_map, mesh=mesh, axis_names=axes, check_vma=False)
  return by_way(of_device, in_specs=(batch, PartitionSpec(), batch), out_specs=batch)(hidden, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(softcap: float | None, part: int | None, hidden, head, targets) -> Float[Array, " tokens"]:
  return _forward(softcap, part, hidden, head, targets)[0]


def _forward(softcap: float | None, part: int | None, hidden, head, targets):
  of_target, normaliser = jnp.zeros(targets.shape), jnp.full(targets.shape, -jnp.inf)
  for start, columns in _parts(head, part):
    asking = after(of_target - normaliser, hidden) if start else hidden
    logits = soft_cap(wide_dot(asking, columns), softcap)
    highest = logits.max(-1, keepdims=True)
    normaliser = jnp.logaddexp(normaliser, highest[:, 0] + jnp.log(sum_exp(logits - highest)))
    of_target += _target_logit(targets - start, logits)
  return of_target - normaliser, (hidden, head, targets, normaliser)


def _backward(softcap: float | None, part: int | None, saved, cotangent):
  """d log p(target) / d logit is 1 at the target, less p everywhere."""
  hidden, head, targets, normaliser = saved
  into_hidden, into_head = jnp.zeros(hidden.shape), []
  for start, columns in _parts(head, part):
    asking = after(into_hidden if start else cotangent, hidden) if part else hidden
    logits = soft_cap(wide_dot(asking, columns), softcap)
    into_logits = _is_target(targets - start, logits) - jnp.exp(logits - normaliser[:, None])
    if softcap is not None:
      into_logits = into_logits * (1 - jnp.square(logits / softcap))
    into_logits = (into_logits * cotangent[:, None]).astype(hidden.dtype)
    into_hidden += wide_dot(into_logits, transposed(columns.astype(hidden.dtype)))
    into_head.append(wide_dot(transposed(hidden), into_logits))
  return into_hidden.astype(hidden.dtype), jnp.concatenate(into_head, axis=1).astype(head.dtype), None


_logprobs.defvjp(_forward, _backward)


def _parts(head: Float[Array, "embed vocab"], part: int | None) -> Iterator[tuple[int, Float[Array, "embed part"]]]:
  """(first column, columns) of each part of the vocabulary."""
  for start in range(0, head.shape[1], part or head.shape[1]):
    yield start, head if part is None else head[:, start : start + part]


def _target_logit(targets, logits) -> Float[Array, " tokens"]:
  """The logit of each target, 0 where it is in another part of the vocabulary."""

  def by_mask(targets, logits):
    return jnp.where(_is_target(targets, logits), logits, 0.0).sum(-1)

  def by_index(targets, logits):
    columns = logits.shape[-1]
    found = jnp.take_along_axis(logits, jnp.clip(targets, 0, columns - 1)[:, None], axis=1)[:, 0]
    return jnp.where((targets >= 0) & (targets < columns), found, 0.0)

  return jax.lax.platform_dependent(targets, logits, cpu=by_index, default=by_mask)


def _is_target(targets, logits) -> Bool[Array, "tokens columns"]:
  """A mask and not an index: it stays local where the vocabulary is sharded, and nothing is gathered or scattered."""
  return jnp.arange(logits.shape[-1]) == targets[:, None]

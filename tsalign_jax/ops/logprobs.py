"""Log-probabilities of target tokens without ever holding [tokens, vocab] in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.ops.einsum import soft_cap, sum_exp, wide_dot

CHUNK = 256  # tokens


def token_logprobs(
  hidden: Float[Array, "tokens embed"],
  head: Float[Array, "embed vocab"],
  targets: Int[Array, " tokens"],
  *,
  softcap: float | None = None,
  chunk: int = CHUNK,
  unroll: bool = False,
) -> Float[Array, " tokens"]:
  """log p(target) of each token, in nats and float32, computed `chunk` tokens at a time.

  Both passes hold [chunk, vocab] at most: the backward pass computes the logits of a chunk again. Products are in the
  dtype of `hidden`, and the gradient of a float32 `head` is summed over the chunks in float32. `unroll` lays the
  chunks out one after the other instead of scanning them, which CPUs run faster.
  """
  tokens = hidden.shape[0]
  chunk = min(chunk, tokens)
  padding = -tokens % chunk
  hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
  targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)
  if unroll:
    parts = [_chunk_logprobs(softcap, rows, head, wanted) for rows, wanted in zip(hidden, targets, strict=True)]
    return jnp.concatenate(parts)[:tokens]
  of_chunk = functools.partial(_chunk_logprobs, softcap)
  return jax.lax.map(lambda pair: of_chunk(pair[0], head, pair[1]), (hidden, targets)).reshape(-1)[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(softcap: float | None, hidden, head, targets) -> Float[Array, " chunk"]:
  return _forward(softcap, hidden, head, targets)[0]


def _forward(softcap: float | None, hidden, head, targets):
  logits = soft_cap(wide_dot(hidden, head), softcap)
  highest = logits.max(-1, keepdims=True)
  normaliser = highest[:, 0] + jnp.log(sum_exp(logits - highest))
  logprobs = jnp.where(_is_target(targets, logits), logits, 0.0).sum(-1) - normaliser
  return logprobs, (hidden, head, targets, normaliser)


def _backward(softcap: float | None, saved, cotangent):
  """d log p(target) / d logit is 1 at the target, less p everywhere."""
  hidden, head, targets, normaliser = saved
  logits, product = jax.vjp(wide_dot, hidden, head)
  logits = soft_cap(logits, softcap)
  into_logits = _is_target(targets, logits) - jnp.exp(logits - normaliser[:, None])
  if softcap is not None:
    into_logits = into_logits * (1 - jnp.square(logits / softcap))
  return *product(into_logits * cotangent[:, None]), None


_chunk_logprobs.defvjp(_forward, _backward)


def _is_target(targets, logits) -> Bool[Array, "chunk vocab"]:
  """A mask and not an index: it stays local where the vocabulary is sharded, and nothing is gathered or scattered."""
  return jnp.arange(logits.shape[-1]) == targets[:, None]

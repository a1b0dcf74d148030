"""Log-probabilities of target tokens without ever holding [tokens, vocab] in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tsalign_jax.ops.einsum import sum_exp, wide_dot


def token_logprobs(
  hidden: Float[Array, "tokens embed"],
  head: Float[Array, "embed vocab"],
  targets: Int[Array, " tokens"],
  *,
  softcap: float | None = None,
  chunk: int = 256,
  unroll: bool = False,
) -> Float[Array, " tokens"]:
  """log p(target) of each token, in nats and float32, computed `chunk` tokens at a time.

  Logits of a chunk are recomputed in the backward pass, so both passes hold [chunk, vocab] at most. `unroll` lays
  the chunks out one after the other instead of scanning them, which CPUs run faster.
  """
  tokens = hidden.shape[0]
  chunk = min(chunk, tokens)
  padding = -tokens % chunk
  hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
  targets = jnp.pad(targets, (0, padding)).reshape(-1, chunk)

  @jax.checkpoint
  def of_chunk(hidden, targets):
    logits = wide_dot(hidden, head)
    if softcap is not None:
      logits = softcap * jnp.tanh(logits / softcap)
    # A masked sum and not a gather: it stays local where the vocabulary is sharded, and its gradient is no scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    logits = logits - highest
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jnp.log(sum_exp(logits))

  if unroll:
    parts = [of_chunk(*pair) for pair in zip(hidden, targets, strict=True)]
    return jnp.concatenate(parts)[:tokens]
  return jax.lax.map(lambda pair: of_chunk(*pair), (hidden, targets)).reshape(-1)[:tokens]

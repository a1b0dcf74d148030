"""Losses of a reward model on pairs: pure functions of the two scores, better one first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(rewards: Float[Array, "batch 2"]) -> Float[Array, " batch"]:
  """-log P(first beats second) in the Bradley-Terry model (Ouyang et al. 2022, eq. 1)."""
  return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1])


def margin_ranking(rewards: Float[Array, "batch 2"], *, margin: float) -> Float[Array, " batch"]:
  """Hinge: how far the score difference falls short of `margin`."""
  return jnp.maximum(0.0, margin - (rewards[:, 0] - rewards[:, 1]))

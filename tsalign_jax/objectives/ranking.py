"""Losses of a reward model on pairs: pure functions of the two scores, better one first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PairLoss = Callable[[Float[Array, "batch 2"]], Float[Array, " batch"]]


def bradley_terry(rewards: Float[Array, "batch 2"], margins: Float[Array, " batch"]) -> Float[Array, " batch"]:
  """-log P(first beats second) in the Bradley-Terry model (Ouyang et al. 2022, eq. 1).

  A margin is by how much the first should be ahead, in units of the score (Touvron et al. 2023, Llama 2, eq. 2).
  """
  return -jax.nn.log_sigmoid(rewards[:, 0] - rewards[:, 1] - margins)


def margin_ranking(rewards: Float[Array, "batch 2"], margins: Float[Array, " batch"]) -> Float[Array, " batch"]:
  """Hinge: how far the score difference falls short of the margin."""
  return jnp.maximum(0.0, margins - (rewards[:, 0] - rewards[:, 1]))


def smoothed(loss: PairLoss, rewards: Float[Array, "batch 2"], *, label_smoothing: float) -> Float[Array, " batch"]:
  """The loss that is expected where a share `label_smoothing` of the pairs stands the wrong way round."""
  return (1 - label_smoothing) * loss(rewards) + label_smoothing * loss(rewards[:, ::-1])


def centring(rewards: Float[Array, "batch 2"]) -> Float[Array, " batch"]:
  """(r1 + r2)^2, which keeps the mean score at 0; differences alone would not (Eisenstein et al. 2023, eq. 2)."""
  return jnp.square(rewards.sum(axis=1))

"""The student's loss: rank a pair as the teacher did."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tsalign_jax.config import Distil
from tsalign_jax.models.functional import Params
from tsalign_jax.objectives import ranking
from tsalign_jax.scoring.reward import RewardEngine


class DistilBatch(NamedTuple):
  """Pairs as the student's engine collates them (better one first), and 1 / (pairs in the whole step)."""

  pairs: Any
  weight: Float[Array, " batch"]


@functools.lru_cache(maxsize=8)
def build_loss(engine: RewardEngine, distil: Distil):
  """The student's loss of a microbatch, with the share of pairs that it already orders as the teacher does."""

  def loss(trainable: Params, frozen: Params, batch: DistilBatch):
    rewards = engine.rewards(engine.model.skeleton.bind({**frozen, **trainable}), batch.pairs)
    if distil.loss == "bradley_terry":
      losses = ranking.bradley_terry(rewards)
    else:
      losses = ranking.margin_ranking(rewards, margin=distil.margin)
    metrics = {
      "loss": losses,
      "accuracy": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
      "margin": rewards[:, 0] - rewards[:, 1],
    }
    total = {name: jnp.sum(batch.weight * value) for name, value in metrics.items()}
    return total["loss"], total

  return loss

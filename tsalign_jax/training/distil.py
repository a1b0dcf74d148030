"""The student's loss: rank a pair as the teacher did."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tsalign_jax.config import Distil
from tsalign_jax.models.functional import Params
from tsalign_jax.objectives import ranking
from tsalign_jax.parallel.mesh import put_batch
from tsalign_jax.scoring.reward import Encoded, RewardEngine


class DistilBatch(NamedTuple):
  """Pairs as the student's engine collates them (better one first), and 1 / (pairs in the whole step)."""

  pairs: Any
  weight: Float[Array, " batch"]


def make_batches(
  engine: RewardEngine, items: Sequence[Encoded], step: Sequence[int], tokens: int
) -> Iterator[DistilBatch]:
  """The microbatches of a step over these pairs, on the device, of about so many tokens each."""
  for part, batch in engine.microbatches(items, step, tokens):
    weight = np.zeros(len(jax.tree.leaves(batch)[0]), np.float32)
    weight[: len(part)] = 1 / len(step)
    yield put_batch(DistilBatch(batch, weight), engine.mesh)


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

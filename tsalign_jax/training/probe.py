"""A reward head to start from: the linear one that separates the pairs best while the backbone stays as it is.

Trained from a random head, a reward model first learns to read noise, and a few thousand pairs are spent on that.
Fitting the head first and then everything is LP-FT (Kumar et al. 2022, arXiv 2202.10054).
"""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from tsalign_jax.types import UserError

FOLDS = 5
PENALTIES = tuple(10.0**power for power in range(-2, 5))  # of the squared weights, for features of variance 1
NEWTON_STEPS = 100


def fit_head(
  better: Float[np.ndarray, "pairs features"],
  worse: Float[np.ndarray, "pairs features"],
  margins: Float[np.ndarray, " pairs"],
  prompts: Sequence[Hashable],
) -> tuple[Float[np.ndarray, " features"], float]:
  """Weights of a linear reward, and the share of left-out pairs that rewards fitted without them order as labelled.

  The loss is Bradley and Terry's with margins, with a penalty on squared weights that cross-validation chooses. All
  pairs of a prompt are left out together: if number n is its first, in fold n modulo 5.
  """
  scale = np.concatenate([better, worse]).std(axis=0, dtype=np.float64) + 1e-6
  difference = (better.astype(np.float64) - worse) / scale
  first: dict[Hashable, int] = {}
  fold = np.asarray([first.setdefault(prompt, number) % FOLDS for number, prompt in enumerate(prompts)])
  losses, shares = [], []
  for penalty in PENALTIES:
    left_out = np.zeros(len(difference))
    for number in range(FOLDS):
      held = fold == number
      left_out[held] = difference[held] @ logistic(difference[~held], margins[~held], penalty)
    losses.append(np.logaddexp(0.0, margins - left_out).mean())
    shares.append(float((left_out > 0).mean()))
  best = int(np.argmin(losses))
  return (logistic(difference, margins, PENALTIES[best]) / scale).astype(np.float32), shares[best]


def logistic(
  difference: Float[np.ndarray, "pairs features"], margins: Float[np.ndarray, " pairs"], penalty: float
) -> Float[np.ndarray, " features"]:
  """The weights w that minimise sum(log(1 + exp(margin - w.x))) + penalty/2 |w|^2, by Newton's method.

  A step that would go too far, as first steps do where margins are large, is halved until it goes down. Raises
  UserError where none of that leads to weights that no step improves, as with features that are not finite.
  """

  def loss(weights: Float[np.ndarray, " features"]) -> float:
    return np.logaddexp(0.0, margins - difference @ weights).sum() + penalty / 2 * weights @ weights

  weights = np.zeros(difference.shape[1])
  for _ in range(NEWTON_STEPS):
    wrong = 1.0 / (1.0 + np.exp(difference @ weights - margins))
    gradient = penalty * weights - difference.T @ wrong
    curvature = (difference.T * (wrong * (1.0 - wrong))) @ difference
    step = np.linalg.solve(curvature + penalty * np.eye(len(weights)), gradient)
    before = loss(weights)
    while loss(weights - step) > before:
      step /= 2
    weights -= step
    if np.abs(step).max() < 1e-8:
      return weights
  raise UserError("probe: no head fits these pairs best (is every weight of the model finite?); set it to false")

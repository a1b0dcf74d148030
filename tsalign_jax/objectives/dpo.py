"""Direct preference optimisation: pure functions of log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sigmoid(
  log_ratios: Float[Array, "batch 2"], *, beta: float, label_smoothing: float = 0.0
) -> Float[Array, " batch"]:
  """DPO loss of each pair (Rafailov et al. 2023, eq. 7); log_ratios holds log(policy/reference), chosen first.

  With label smoothing e it is the conservative loss: labels are taken to be wrong with probability e.
  """
  margin = beta * (log_ratios[:, 0] - log_ratios[:, 1])
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def sft(logps: Float[Array, "batch 2"], lengths: Int[Array, "batch 2"]) -> Float[Array, " batch"]:
  """Negative log-likelihood per token of each chosen response (the term of Pang et al. 2024, eq. 1)."""
  return -logps[:, 0] / jnp.maximum(lengths[:, 0], 1)


def metrics(
  logps: Float[Array, "batch 2"], reference_logps: Float[Array, "batch 2"], *, beta: float
) -> dict[str, Float[Array, " batch"]]:
  """What TRL reports of each pair, under its names; rewards are beta * log(policy/reference).

  `logps/drift` is ours: |log(policy/reference)| in nats, the mean of the two; 0 where the policy is the reference.
  """
  rewards = beta * (logps - reference_logps)
  return {
    "rewards/chosen": rewards[:, 0],
    "rewards/rejected": rewards[:, 1],
    "rewards/margins": rewards[:, 0] - rewards[:, 1],
    "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
    "logps/chosen": logps[:, 0],
    "logps/rejected": logps[:, 1],
    "logps/drift": jnp.abs(logps - reference_logps).mean(axis=1),
  }

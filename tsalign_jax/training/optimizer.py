"""AdamW with warm-up and clipping, and the accumulate-then-update pair of programs that every training shares."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tsalign_jax.config import Optimizer
from tsalign_jax.models.functional import Params

# (trainable, frozen, microbatch) -> (sum over pairs of weighted losses, per-pair metrics to be summed)
LossFn = Callable[[Params, Params, Any], tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]]


def make_schedule(settings: Optimizer, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0, then as the settings say."""
  warmup = round(settings.warmup * steps)
  rest = max(1, steps - warmup)
  after = {
    "constant": optax.constant_schedule(settings.learning_rate),
    "linear": optax.linear_schedule(settings.learning_rate, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(settings.learning_rate, rest),
  }[settings.schedule]
  if not warmup:
    return after
  # The first step already learns: a step at rate 0 would be wasted.
  rise = optax.linear_schedule(settings.learning_rate / (warmup + 1), settings.learning_rate, warmup)
  return optax.join_schedules([rise, after], [warmup])


def make_optimizer(settings: Optimizer, steps: int) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW."""
  return optax.chain(
    optax.clip_by_global_norm(settings.clip),
    optax.adamw(make_schedule(settings, steps), weight_decay=settings.weight_decay),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
  """One optimizer step as two programs, so that its microbatches may differ in number and shape.

  Losses come weighted with 1 / (pairs in the whole batch), so accumulated gradients are those of the whole batch.
  """

  accumulate: Callable
  update: Callable
  init: Callable
  schedule: optax.Schedule

  def step(self, trainable: Params, frozen: Params, opt_state, microbatches):
    """(trainable, opt_state, metrics) after one step over all microbatches; the old buffers are donated."""
    gradients = metrics = None
    for microbatch in microbatches:
      gradients, metrics = self.accumulate(gradients, metrics, trainable, frozen, microbatch)
    return self.update(trainable, opt_state, gradients, metrics)


@functools.lru_cache(maxsize=16)
def build_trainer(loss: LossFn, settings: Optimizer, steps: int) -> Trainer:
  """The trainer of a loss; programs are compiled once for each shape of microbatch."""
  optimizer = make_optimizer(settings, steps)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def accumulate(gradients, metrics, trainable, frozen, microbatch):
    (_, new_metrics), new = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, microbatch)
    if gradients is None:
      return new, dict(new_metrics)
    return jax.tree.map(jnp.add, gradients, new), jax.tree.map(jnp.add, metrics, dict(new_metrics))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(trainable, opt_state, gradients, metrics):
    norm = optax.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, metrics | {"grad_norm": norm}

  return Trainer(accumulate, update, jax.jit(optimizer.init), make_schedule(settings, steps))

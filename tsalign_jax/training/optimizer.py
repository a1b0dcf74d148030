"""AdamW with warm-up and clipping, and the accumulate-then-update pair of programs that every training shares."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tsalign_jax.config import Optimizer
from tsalign_jax.models.functional import Params, Skeleton
from tsalign_jax.parallel.mesh import replicated

# (trainable, frozen, microbatch) -> (sum over pairs of weighted losses, metrics summed with the same weights)
LossFn = Callable[[Params, Params, Any], tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]]

# XLA may leave out a rounding to bfloat16 between two operations that it fuses, and fuses differently when there is a
# backward pass. Without that freedom a loss computes the very numbers that its forward pass computes alone.
ROUND_ALIKE = {"xla_allow_excess_precision": False}


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


class State(NamedTuple):
  """What a training changes from step to step."""

  trainable: Params
  opt_state: Any
  gradients: Params
  """Room for those of a step, whatever is in it: one lot of memory for all steps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
  """One optimizer step as a few programs, so that its microbatches may differ in number and shape.

  Losses come weighted with 1 / (pairs in the whole batch), so accumulated gradients are those of the whole batch.
  Gradients and optimizer moments live where their parameters do.
  """

  room: Callable  # (trainable) -> gradients, for `accumulate` to write to
  accumulate: Callable  # (gradients, first, trainable, frozen, microbatch) -> gradients, metrics; donates the gradients
  update: Callable  # (trainable, opt_state, gradients) -> trainable, opt_state, norm; donates the first two
  init: Callable
  abstract_state: Callable
  schedule: optax.Schedule

  def start(self, trainable: Params, opt_state: Any = None) -> State:
    """The state before a step; without `opt_state`, before the first one."""
    return State(trainable, self.init(trainable) if opt_state is None else opt_state, self.room(trainable))

  def step(self, state: State, frozen: Params, microbatches: Iterable[Any]):
    """(state, metrics) after one step over all microbatches; the old state's buffers are donated.

    The metrics stay on the device: `fetch` makes numbers of them.
    """
    gradients, metrics = self.gradients(state, frozen, microbatches)
    trainable, opt_state, norm = self.update(state.trainable, state.opt_state, gradients)
    return State(trainable, opt_state, gradients), [*metrics, {"grad_norm": norm}]

  def gradients(self, state: State, frozen: Params, microbatches: Iterable[Any]):
    """(gradients of the summed losses, metrics of each microbatch); the old gradients' buffers are donated."""
    gradients, metrics = state.gradients, []
    for microbatch in microbatches:
      gradients, of_part = self.accumulate(gradients, not metrics, state.trainable, frozen, microbatch)
      metrics.append(of_part)
    return gradients, metrics


def fetch(metrics: Sequence[Mapping[str, Array]]) -> dict[str, float]:
  """The numbers of a whole step, by name: sums over its microbatches."""
  total: Counter[str] = Counter()
  for part in jax.device_get(metrics):
    total.update({name: float(value) for name, value in part.items()})
  return dict(sorted(total.items()))


@functools.lru_cache(maxsize=16)
def build_trainer(loss: LossFn, settings: Optimizer, steps: int, skeleton: Skeleton, mesh: Mesh) -> Trainer:
  """The trainer of a loss; gradients are compiled once for each shape of microbatch, whatever the number of steps."""
  optimizer = make_optimizer(settings, steps)
  place, placed = functools.partial(_place, skeleton, mesh), skeleton.shardings(mesh)

  def state_shardings(trainable: Params):
    shapes = jax.eval_shape(optimizer.init, dict(trainable))
    of_params = {name: placed[name] for name in trainable}
    return optax.tree.map_params(
      optimizer, lambda _, where: where, shapes, of_params, transform_non_params=lambda _: replicated(mesh)
    )

  def init(trainable: Params):
    return jax.jit(optimizer.init, out_shardings=state_shardings(trainable))(dict(trainable))

  def abstract_state(trainable: Params):
    shapes = jax.eval_shape(optimizer.init, dict(trainable))
    return jax.tree.map(
      lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
      shapes,
      state_shardings(trainable),
    )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(trainable, opt_state, gradients):
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    opt_state = jax.lax.with_sharding_constraint(opt_state, state_shardings(trainable))
    return place(optax.apply_updates(trainable, updates)), opt_state, norm

  return Trainer(*_build_gradients(loss, skeleton, mesh), update, init, abstract_state, make_schedule(settings, steps))


@functools.lru_cache(maxsize=16)
def _build_gradients(loss: LossFn, skeleton: Skeleton, mesh: Mesh) -> tuple[Callable, Callable]:
  """`room` and `accumulate` of a trainer."""
  place = functools.partial(_place, skeleton, mesh)

  @jax.jit
  def room(trainable: Params):
    return place(jax.tree.map(jnp.zeros_like, dict(trainable)))

  @functools.partial(jax.jit, donate_argnums=0, compiler_options=ROUND_ALIKE)
  def accumulate(gradients, first, trainable, frozen, microbatch):
    (_, metrics), new = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, microbatch)
    return jax.tree.map(lambda old, new: jnp.where(first, 0, old) + new, gradients, place(new)), dict(metrics)

  return room, accumulate


def _place(skeleton: Skeleton, mesh: Mesh, params: Params) -> dict[str, jax.Array]:
  placed = skeleton.shardings(mesh)
  return {name: jax.lax.with_sharding_constraint(array, placed[name]) for name, array in params.items()}

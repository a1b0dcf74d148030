"""Low-rank adapters: y = W x + (alpha / rank) B A x (Hu et al. 2021), on a module that already exists."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tsalign_jax.config import LoRA
from tsalign_jax.models.functional import Params, Skeleton
from tsalign_jax.models.layers import Linear
from tsalign_jax.models.loading import ModelHandle


@functools.lru_cache(maxsize=8)
def adapted_skeleton(model: ModelHandle, lora: LoRA | None) -> Skeleton:
  """The model's skeleton with adapters on the maps that `lora` names; the plain one where lora is None."""
  if lora is None:
    return model.skeleton

  def make(rngs: nnx.Rngs):
    module = model.skeleton.make(rngs)
    for path, part in nnx.iter_modules(module):
      if isinstance(part, Linear) and path[-1] in lora.targets:
        _adapt(part, lora, rngs)
    return module

  return Skeleton.of(make)


def _adapt(linear: Linear, lora: LoRA, rngs: nnx.Rngs) -> None:
  shape, axes = linear.kernel.shape, linear.kernel.axes
  layers, shape = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
  inputs, outputs = shape[: linear.inputs], shape[linear.inputs :]
  # A is random and B zero, so that training starts from the model as it is.
  scale = jnp.prod(jnp.asarray(inputs, jnp.float32)) ** -0.5
  value = scale * jax.random.normal(rngs.params(), (*layers, *inputs, lora.rank), jnp.float32)
  linear.lora_a = nnx.Param(value, axes=(*axes[: linear.inputs], "rank"))
  linear.lora_b = nnx.Param(jnp.zeros((*layers, lora.rank, *outputs)), axes=("rank", *axes[linear.inputs :]))
  linear.lora_scale = lora.alpha / lora.rank


def is_adapter(name: str) -> bool:
  """Whether a parameter belongs to an adapter."""
  return name.endswith((".lora_a", ".lora_b"))


def fresh_adapters(skeleton: Skeleton, key: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
  """New adapters on the mesh; with them the model is what it was without."""
  fresh = skeleton.init(key, {name for name in skeleton.specs if is_adapter(name)})
  placed = skeleton.shardings(mesh)
  return {name: jax.device_put(array, placed[name]) for name, array in fresh.items()}


def merge(params: Params, lora: LoRA) -> dict[str, jax.Array]:
  """The parameters with every adapter added into its matrix; no adapter is left."""
  scale = lora.alpha / lora.rank
  merged = {name: array for name, array in params.items() if not is_adapter(name)}
  for name in params:
    if name.endswith(".lora_a"):
      kernel = name.removesuffix("lora_a") + "kernel"
      merged[kernel] = _add(merged[kernel], params[name], params[name.removesuffix("a") + "b"], scale)
  return merged


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _add(kernel, a, b, scale: float):
  inputs = a.ndim - 1
  if kernel.ndim < a.ndim + b.ndim - 2:  # stacked layers share their first axis
    delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
  else:
    delta = jnp.tensordot(a, b, (inputs, 0))
  return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

"""Low-rank adapters: y = W x + (alpha / rank) B A x (Hu et al. 2021), on a module that already exists."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tsalign_jax.config import LoRA
from tsalign_jax.models.config import ModelConfig
from tsalign_jax.models.functional import Params, Skeleton
from tsalign_jax.models.layers import Linear
from tsalign_jax.models.loading import ModelHandle, wide
from tsalign_jax.types import UserError

EXACT = jax.lax.Precision.HIGHEST  # elsewhere than on CPUs, products of float32 are rounded otherwise
DECODER_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_MAPS = ("query", "key", "value", "attention_output", "up", "down")
MAPS = {"bert": BERT_MAPS, "roberta": BERT_MAPS, "modernbert": ("attn_qkv", "attn_out", "mlp_in", "mlp_out")}


def check_targets(lora: LoRA | None, config: ModelConfig, where: str) -> None:
  """Raises UserError for a target that the model does not have; `where` is the key that holds `lora`."""
  known = MAPS.get(config.family, DECODER_MAPS)
  for target in (lora.targets or ()) if lora else ():
    if target not in known:
      raise UserError(f"{where}.lora.targets: a {config.family} has no {target}; it has {', '.join(known)}")


@functools.lru_cache(maxsize=8)
def adapted_skeleton(model: ModelHandle, lora: LoRA | None) -> Skeleton:
  """The model's skeleton with adapters on the maps that `lora` names; the plain one where lora is None."""
  if lora is None:
    return model.skeleton

  targets = lora.targets or MAPS.get(model.config.family, DECODER_MAPS)

  def make(rngs: nnx.Rngs):
    module = model.skeleton.make(rngs)
    for path, part in nnx.iter_modules(module):
      if isinstance(part, Linear) and path[-1] in targets:
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


class TrainedPart(NamedTuple):
  """What of a model is trained and what is not: everything, or adapters on a frozen backbone.

  A reward head is always trained: most are new, and it is small.
  """

  skeleton: Skeleton
  names: list[str]
  load: Callable[[], Params]  # what is trained, in float32
  frozen: Params
  lora: LoRA | None

  def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what is trained."""
    everything = self.skeleton.abstract(mesh, jnp.float32)
    return {name: everything[name] for name in self.names}

  def whole(self, trained: Params) -> Params:
    """The model's parameters after training, adapters merged."""
    return merge({**self.frozen, **trained}, self.lora) if self.lora else trained


def trained_part(
  model: ModelHandle, lora: LoRA | None, load: Callable[[], Params], key: jax.Array, mesh: Mesh
) -> TrainedPart:
  """What is trained of the model whose parameters `load` gives; `key` draws the adapters."""
  if lora is None:
    return TrainedPart(model.skeleton, list(model.skeleton.specs), lambda: wide(load()), {}, None)
  skeleton, params = adapted_skeleton(model, lora), load()
  head = {} if not model.config.reward_head else {n: a for n, a in params.items() if not n.startswith("model.")}
  frozen = {name: array for name, array in params.items() if name not in head}
  names = [name for name in skeleton.specs if is_adapter(name) or name in head]
  return TrainedPart(skeleton, names, lambda: fresh_adapters(skeleton, key, mesh) | wide(head), frozen, lora)


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
    delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision=EXACT))(a, b)
  else:
    delta = jnp.tensordot(a, b, (inputs, 0), precision=EXACT)
  return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

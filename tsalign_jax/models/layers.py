"""The parts that decoders and encoders are made of: linear maps, norms, rotary positions, activations.

Every parameter is declared once, with its shape and logical axes; initialisation, sharding, checkpoints and the
translation to Hugging Face names all read that one declaration.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import Rope
from tsalign_jax.ops.einsum import wide_dot
from tsalign_jax.ops.order import recomputed

ACTIVATIONS: Mapping[str, Callable] = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "tanh": jnp.tanh,
}


def activate(name: str, x: Float[Array, "*batch size"], *factors: Float[Array, "*batch size"]):
  """An activation by its Hugging Face name, times the factors of a gated one; in the dtype of x.

  It is computed in float32, as no platform computes one in bfloat16 any faster, and again in the backward pass.
  """

  def activated(x, *factors):
    return math.prod(factors, start=ACTIVATIONS[name](x.astype(jnp.float32))).astype(x.dtype)

  return recomputed(activated)(x, *factors)


Axes = Mapping[str, int]  # logical axis -> size, in order: {"heads": 9, "head_dim": 64}


class Linear(nnx.Module):
  """A linear map from the last axes of its input to new last axes, with an optional low-rank adapter (LoRA)."""

  def __init__(self, inputs: Axes, outputs: Axes, rngs: nnx.Rngs, *, bias: bool = False):
    shape = (*inputs.values(), *outputs.values())
    value = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
    self.kernel = nnx.Param(value, axes=(*inputs, *outputs), inputs=len(inputs))
    self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs)) if bias else None
    self.inputs = len(inputs)
    self.lora_a = self.lora_b = nnx.data(None)  # set by `models.lora`
    self.lora_scale = 0.0

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    """The map applied, in the dtype of x, with everything summed in float32."""
    y = _contract(x, self.kernel[...], self.inputs)
    if self.lora_a is not None:
      low = _contract(x, self.lora_a[...], self.inputs).astype(x.dtype)
      y = y + self.lora_scale * _contract(low, self.lora_b[...], 1)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


def _contract(x, kernel, inputs: int):
  # As one plain matrix product: that is what CPUs have a fast bfloat16 path for.
  batch = x.shape[: x.ndim - inputs]
  matrix = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
  return wide_dot(x.reshape(*batch, -1), matrix).reshape(*batch, *kernel.shape[inputs:])


class Embedding(nnx.Module):
  """A table of vectors, one for each token (or position)."""

  def __init__(self, rows: Axes, embed: int, rngs: nnx.Rngs):
    value = 0.02 * jax.random.normal(rngs.params(), (*rows.values(), embed), jnp.float32)
    self.embedding = nnx.Param(value, axes=(*rows, "embed"))

  def __call__(self, ids: Int[Array, "..."], dtype) -> Float[Array, "... embed"]:
    """The vectors of these ids."""
    return self.embedding[...][ids].astype(dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square norm over the last axis; `offset` 1 gives Gemma's (1 + w)."""

  def __init__(self, size: Axes, eps: float, *, offset: float = 0.0):
    self.scale = nnx.Param(jnp.full(tuple(size.values()), 1.0 - offset), axes=(None,))
    self.eps, self.offset = eps, offset

  def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    """x, normed in float32, in its own dtype."""

    def normed(x, scale):
      wide = x.astype(jnp.float32)
      wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
      return (wide * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)

    return recomputed(normed)(x, self.scale[...])


class LayerNorm(nnx.Module):
  """Layer norm over the last axis, with or without a bias."""

  def __init__(self, size: int, eps: float, *, bias: bool = True):
    self.scale = nnx.Param(jnp.ones((size,)), axes=(None,))
    self.bias = nnx.Param(jnp.zeros((size,)), axes=(None,)) if bias else None
    self.eps = eps

  def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    """x, normed in float32, in its own dtype."""

    def normed(x, scale, *bias):
      wide = x.astype(jnp.float32)
      wide = wide - wide.mean(axis=-1, keepdims=True)
      wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
      wide = wide * scale.astype(jnp.float32)
      for shift in bias:
        wide = wide + shift.astype(jnp.float32)
      return wide.astype(x.dtype)

    return recomputed(normed)(x, self.scale[...], *([] if self.bias is None else [self.bias[...]]))


class Rotation(NamedTuple):
  """The rotary embedding at some positions."""

  cos: Float[Array, "batch tokens half_head_dim"]
  sin: Float[Array, "batch tokens half_head_dim"]


def rotation(rope: Rope, head_dim: int, position: Int[Array, "batch tokens"], positions: int) -> Rotation:
  """Cosines and sines of the rotary embedding at positions below `positions` (Su et al. 2021).

  They are looked up in a table that is made while the program is: computed in it, XLA would compute them again for
  every layer and every head.
  """
  frequency = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  if rope.kind == "linear":
    frequency = frequency / rope.factor
  elif rope.kind == "llama3":  # stretched as in Llama 3.1
    turns = rope.original_positions * frequency / (2 * np.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency
  angle = np.arange(positions, dtype=np.float32)[:, None] * frequency.astype(np.float32)
  return Rotation(jnp.asarray(np.cos(angle))[position], jnp.asarray(np.sin(angle))[position])


def rotate(x: Float[Array, "batch tokens heads head_dim"], turn: Rotation):
  """x with its head dimensions rotated in pairs (i, i + head_dim / 2), as Hugging Face lays them out."""
  cos, sin = (part[:, :, None, :] for part in turn)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

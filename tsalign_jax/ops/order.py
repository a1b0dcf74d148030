"""The order of computations, where it decides what stays in caches and what memory is held."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tsalign_jax.parallel.mesh import platform

CACHED = 1 << 20  # elements of float32 that stay in a CPU's caches from one pass over them to the next


def on_one_cpu(mesh: Mesh | None) -> bool:
  """Whether programs on this mesh run on a single CPU device."""
  return mesh is not None and mesh.size == 1 and platform(mesh) == "cpu"


def after(earlier: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x, once something else is computed: zero is added to it, which XLA cannot know.

  XLA's CPU backend ignores barriers, and computes equal steps of independent pieces side by side, so that all pieces
  are held at once and none stays in a cache.
  """
  zero = jnp.minimum(jnp.abs(jax.lax.stop_gradient(earlier)).max(), 0)
  return x + zero.astype(x.dtype)


def recomputed(function: Callable[..., Float[Array, "*shape"]]) -> Callable[..., Float[Array, "*shape"]]:
  """A function of arrays of which the backward pass keeps the inputs, and computes the rest again.

  As `jax.checkpoint`, where XLA heeds no barriers and would merge the two computations: each element of an input waits
  for its cotangent, which is local where arrays are sharded.
  """

  def forward(*inputs):
    return function(*inputs), inputs

  def backward(inputs, cotangent):
    zero = jnp.minimum(jnp.abs(cotangent), 0)
    later = [each + zero.astype(each.dtype) if each.shape == zero.shape else each for each in inputs]
    return jax.vjp(function, *later)[1](cotangent)

  whole = jax.custom_vjp(function)
  whole.defvjp(forward, backward)
  return whole

"""Matrix products summed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide_dot(
  x: Float[Array, "*batch inputs"], matrix: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
  """x @ matrix with a float32 result. Products of float32 arrays are float32 everywhere, also on TPU and GPU."""
  return jnp.dot(x, matrix, preferred_element_type=jnp.float32, precision=_precision(x))


def _precision(array):
  return jax.lax.Precision.HIGHEST if array.dtype == jnp.float32 else None


def wide_einsum(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
  """einsum of bfloat16 or float32 arrays with a float32 result.

  XLA's CPU backend has no batched bfloat16 product with a float32 result, so there the inputs are widened first;
  the platform is chosen when the program is lowered, not by the machine that traces it.
  """

  def direct(a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=_precision(a))

  def widened(a, b):
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

  return jax.lax.platform_dependent(a, b, cpu=widened, default=direct)

"""Matrix products and sums of bfloat16 or float32 arrays, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def wide_matmul(
  a: Float[Array, "*batch rows inner"], b: Float[Array, "*batch inner columns"]
) -> Float[Array, "*batch rows columns"]:
  """a @ b with a float32 result, the inputs in the dtype of a; batch axes lead and are the same in both.

  Products of float32 arrays are float32 everywhere, also on TPU and GPU. Where a is bfloat16, so are the inputs of
  both products of the backward pass: a float32 cotangent would lose the fast path of every platform. The gradient of
  a float32 b comes out in float32 all the same. XLA's CPU backend runs only this form of a product fast in bfloat16,
  and refuses some others.
  """
  return _matmul(a, b)


def wide_dot(
  x: Float[Array, "*batch inputs"], matrix: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
  """x @ matrix with a float32 result, as one plain matrix product."""
  return wide_matmul(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], matrix.shape[1])


def _matmul(a, b):
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=jnp.float32, precision=precision)


def _forward(a, b):
  return _matmul(a, b), (a, b)


def _backward(inputs, cotangent):
  a, b = inputs
  cotangent = cotangent.astype(a.dtype)
  into_a = _matmul(cotangent, jnp.swapaxes(b, -1, -2))
  into_b = _matmul(jnp.swapaxes(a, -1, -2), cotangent)
  return into_a.astype(a.dtype), into_b.astype(b.dtype)


wide_matmul.defvjp(_forward, _backward)


def sum_exp(x: Float[Array, "*rows columns"]) -> Float[Array, "*rows"]:
  """The sum of exp(x) over the last axis.

  XLA's CPU backend makes one kernel of the two, which is 8 times slower than an exponential and a product with ones.
  """

  def as_product(x):
    return jnp.exp(x) @ jnp.ones(x.shape[-1], x.dtype)

  def as_sum(x):
    return jnp.exp(x).sum(-1)

  return jax.lax.platform_dependent(x, cpu=as_product, default=as_sum)

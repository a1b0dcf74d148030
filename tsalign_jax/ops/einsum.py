"""Matrix products of bfloat16 or float32 arrays with float32 results, and what is done to these."""

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
  into_a = _matmul(cotangent, transposed(b.astype(a.dtype)))
  into_b = _matmul(transposed(a), cotangent)
  return into_a.astype(a.dtype), into_b.astype(b.dtype)


def transposed(matrix: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
  """The transpose, on CPUs as an array of its own.

  XLA would make it a part of the product that reads it, and its CPU backend computes such a product of bfloat16 arrays
  in float32, at less than half the speed. It does not see through two reshapes.
  """
  return _swapped(matrix, -2)


def heads_first(x: Float[Array, "*batch length heads head_dim"]) -> Float[Array, "*batch heads length head_dim"]:
  """What has a batch of its own for each head, on CPUs as an array of its own: see `transposed`."""
  return _swapped(x, -3)


def _swapped(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """An axis and the next one change places; `axis` counts from the end."""

  def plainly(x):
    return jnp.swapaxes(x, axis, axis + 1)

  def apart(x):
    shape = (*x.shape[:axis], size // 2, 2, *x.shape[x.ndim + axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, axis - 1).reshape(plainly(x).shape)

  size = x.shape[axis]
  if x.dtype != jnp.bfloat16 or size % 2:
    return plainly(x)
  return jax.lax.platform_dependent(x, cpu=apart, default=plainly)


wide_matmul.defvjp(_forward, _backward)


def soft_cap(logits: Float[Array, "*rows columns"], cap: float | None) -> Float[Array, "*rows columns"]:
  """cap * tanh(logits / cap), as in Gemma 2; unchanged where cap is None."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def sum_exp(x: Float[Array, "*rows columns"]) -> Float[Array, "*rows"]:
  """The sum of exp(x) over the last axis.

  XLA's CPU backend makes one kernel of the two, which is 8 times slower than an exponential and a product with ones.
  """

  def as_product(x):
    return jnp.exp(x) @ jnp.ones(x.shape[-1], x.dtype)

  def as_sum(x):
    return jnp.exp(x).sum(-1)

  return jax.lax.platform_dependent(x, cpu=as_product, default=as_sum)

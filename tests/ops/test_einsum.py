"""Products of bfloat16 and float32 arrays, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsalign_jax.ops.einsum import sum_exp, wide_matmul


def inputs(*batch: int, rows: int, inner: int, columns: int, dtype):
  """a, b and a cotangent of a @ b."""
  random = np.random.default_rng(0)
  shapes = (rows, inner), (inner, columns), (rows, columns)
  a, b, cotangent = (jnp.asarray(random.normal(size=(*batch, *shape)), dtype) for shape in shapes)
  return a, b, cotangent.astype(jnp.float32)


def backward(a, b, cotangent):
  return jax.vjp(wide_matmul, a, b)[1](cotangent)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("sizes", [(8, 6, 4), (7, 5, 3), (1, 4, 2)])
def test_product_and_gradients_equal_numpy(dtype, batch, sizes):
  a, b, cotangent = inputs(*batch, **dict(zip(("rows", "inner", "columns"), sizes, strict=True)), dtype=dtype)
  x, y, c = (np.asarray(array.astype(dtype), np.float64) for array in (a, b, cotangent))
  out, (into_a, into_b) = wide_matmul(a, b), jax.jit(backward)(a, b, cotangent)
  assert out.dtype == jnp.float32 and into_a.dtype == into_b.dtype == dtype
  np.testing.assert_allclose(out, x @ y, rtol=1e-5, atol=1e-5)
  rounding = 1e-5 if dtype == jnp.float32 else 2**-7
  for ours, exact in ((into_a, c @ y.swapaxes(-1, -2)), (into_b, x.swapaxes(-1, -2) @ c)):
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=rounding, atol=rounding)


def test_gradient_of_a_float32_matrix_is_not_rounded():
  a, b, cotangent = inputs(rows=64, inner=8, columns=8, dtype=jnp.bfloat16)
  (into_b,) = jax.vjp(lambda b: wide_matmul(a, b), b.astype(jnp.float32))[1](cotangent)
  exact = np.asarray(a, np.float64).T @ np.asarray(cotangent.astype(jnp.bfloat16), np.float64)
  np.testing.assert_allclose(into_b, exact, rtol=1e-5, atol=1e-5)


def test_backward_products_read_bfloat16_as_the_forward_one_does():
  a, b, cotangent = inputs(rows=64, inner=96, columns=160, dtype=jnp.bfloat16)
  if "f32[64,96]" in jax.jit(wide_matmul).lower(a, b).compile().as_text():
    pytest.skip("this CPU multiplies in float32 only")
  program = jax.jit(backward).lower(a, b, cotangent).compile().as_text()
  assert "bf16[160,96]" in program and "f32[160,96]" not in program
  assert "bf16[96,64]" in program and "f32[96,64]" not in program


def test_sum_exp_equals_numpy():
  x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
  np.testing.assert_allclose(sum_exp(x), np.exp(x).sum(-1), rtol=1e-6)

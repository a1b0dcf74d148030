"""What is computed again in the backward pass, and what is kept for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsalign_jax.models.layers import activate
from tsalign_jax.ops.order import recomputed

SHAPE = (1024, 128)


def gated(x, factor):
  return x * jax.nn.sigmoid(x) * factor


def through_layers(function, layers, x, factor):
  mixing = jnp.eye(SHAPE[1])
  for _ in range(layers):
    x = function(x @ mixing, factor)
  return x.sum()


def inputs():
  return [jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0))]


def kept_a_layer(function) -> float:
  """What one more layer makes the backward pass keep, in arrays."""

  def memory(layers):
    gradient = jax.jit(jax.grad(functools.partial(through_layers, function, layers)))
    return gradient.lower(*inputs()).compile().memory_analysis().temp_size_in_bytes

  return (memory(12) - memory(4)) / 8 / (4 * np.prod(SHAPE))


def test_recomputed_is_the_same_function_with_the_same_gradient():
  def gradient(function):
    return jax.jit(jax.value_and_grad(functools.partial(through_layers, function, 3), argnums=(0, 1)))(*inputs())

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *map(gradient, (gated, recomputed(gated)))
  )


@pytest.mark.parametrize("function", [recomputed(gated), functools.partial(activate, "silu")])
def test_the_backward_pass_keeps_inputs_only(function):
  assert kept_a_layer(function) < 1.1
  assert kept_a_layer(gated) > 1.9

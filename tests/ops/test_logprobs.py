"""Log-probabilities in chunks, against the dense ones."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from tsalign_jax.ops.logprobs import token_logprobs, token_logprobs_of_devices
from tsalign_jax.parallel.mesh import batch_ways, make_mesh, sharding


def dense(hidden, head, targets, softcap):
  logits = hidden @ head
  logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
  return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


# Each example is a program of its own; these are chunks and parts of one, that do not divide, and that are too large.
@example(tokens=7, chunk=1, part=None, vocab=5, softcap=None, seed=0)
@example(tokens=7, chunk=3, part=1, vocab=5, softcap=2.0, seed=0)
@example(tokens=7, chunk=50, part=3, vocab=5, softcap=None, seed=0)
@example(tokens=7, chunk=None, part=35, vocab=5, softcap=2.0, seed=0)
@settings(max_examples=10)
@given(
  tokens=some.integers(1, 40),
  chunk=some.none() | some.integers(1, 50),
  part=some.none() | some.integers(1, 35),
  vocab=some.integers(2, 30),
  softcap=some.none() | some.floats(1, 20),
  seed=some.integers(0, 1000),
)
def test_chunked_equals_dense_with_its_gradients(tokens, chunk, part, vocab, softcap, seed):
  random = np.random.default_rng(seed)
  shapes = (tokens, 6), (6, vocab), (tokens,)
  hidden, head, weights = (random.normal(size=shape).astype(np.float32) for shape in shapes)
  targets = random.integers(0, vocab, tokens)

  @jax.jit
  def both(hidden, head, weights):
    chunked = partial(token_logprobs, targets=targets, softcap=softcap, chunk=chunk, part=part)
    ours, pull = jax.vjp(chunked, hidden, head)
    expected, pull_dense = jax.vjp(partial(dense, targets=targets, softcap=softcap), hidden, head)
    return (ours, *pull(weights)), (expected, *pull_dense(weights))

  for found, expected in zip(*both(hidden, head, weights), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pieces", [{"chunk": 128}, {"chunk": None, "part": 512}], ids=["chunks", "parts"])
def test_no_array_of_all_tokens_by_vocabulary(pieces):
  tokens, embed, vocab = 2048, 16, 8192
  shapes = (tokens, embed), (embed, vocab), (tokens,)
  hidden, head, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

  def loss(hidden, head, weights, targets):
    return (weights * token_logprobs(hidden, head, targets, **pieces)).sum()

  program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, weights, targets).compile()
  assert f"[{tokens},{vocab}]" not in program.as_text()
  assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["fsdp", "all axes"])
def test_ways_compute_their_own_tokens_and_wait_for_nobody_between_chunks(axes):
  mesh, embed, vocab = make_mesh(**axes), 16, 64
  random, shape = np.random.default_rng(0), (batch_ways(mesh), 40)
  where = {
    "head": sharding(("embed", "vocab"), (embed, vocab), mesh),
    "hidden": sharding(("batch", None, None), (*shape, embed), mesh),
  }
  hidden = jax.device_put(random.normal(size=(*shape, embed)).astype(np.float32), where["hidden"])
  head = jax.device_put(random.normal(size=(embed, vocab)).astype(np.float32), where["head"])
  targets, weights = random.integers(0, vocab, shape), random.normal(size=shape).astype(np.float32)

  def loss(logprobs, hidden, head):
    return (weights * logprobs(hidden, head)).sum()

  def whole(hidden, head):
    return dense(hidden.reshape(-1, embed), head, targets.reshape(-1), None).reshape(shape)

  split = partial(token_logprobs_of_devices, targets=targets, mesh=mesh, chunk=16)
  program = jax.jit(jax.grad(partial(loss, split), (0, 1))).lower(hidden, head).compile()
  for found, expected in zip(program(hidden, head), jax.grad(partial(loss, whole), (0, 1))(hidden, head), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)
  if mesh.shape["tensor"] == 1:  # a vocabulary that is split needs its sums in every chunk
    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program.as_text(), flags=re.M | re.S))
    bodies = re.findall(r"body=%?([\w.\-]+)", program.as_text())
    assert bodies and not any(re.search("all-|reduce-scatter|permute", computations[body]) for body in bodies)

"""The kernel against plain XLA attention, interpreted on CPU in float32."""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as some
from jax.experimental.pallas.ops.tpu import splash_attention
from ragged import packed_rows, ragged_batch, ragged_items, real_tokens

from tsalign_jax.config import Align, Policy
from tsalign_jax.data.batching import prompts_only
from tsalign_jax.data.packing import Item
from tsalign_jax.models.loading import language_model
from tsalign_jax.ops import splash
from tsalign_jax.ops.attention import PackedRows, TrunkAndBranches
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.sampling.cache import KV, Prefill
from tsalign_jax.training.align import AlignBatch, build_loss
from tsalign_jax.types import Branches, Packed

TOLERANCE = 2e-5


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 128, so that a few hundred tokens make blocks that are full, partial and empty."""
  monkeypatch.setattr(splash, "BLOCKS", (128,))


def with_kernel(monkeypatch, use: bool) -> None:
  monkeypatch.setattr(splash, "applies", lambda mesh, dtype: use)


def seen(prompt: int, response: int, window: int | None, query: int, key: int) -> bool:
  """Whether one column sees another, from the definition: a token at a distance along its own sequence."""

  def place(column):
    return (None, column - prompt) if column < prompt else divmod(column - prompt, response)

  (query_branch, query_place), (key_branch, key_place) = place(query), place(key)
  distance = query_place - key_place
  return key_branch in (None, query_branch) and distance >= 0 and (window is None or distance < window)


@given(
  prompt=some.integers(1, 40),
  response=some.integers(1, 20),
  width=some.integers(1, 90),
  window=some.none() | some.integers(1, 50),
  data=some.data(),
)
def test_mask_block_is_who_sees_whom(prompt, response, width, window, data):
  rows, columns = (
    slice(*sorted((data.draw(some.integers(0, width)), data.draw(some.integers(0, width))))) for _ in range(2)
  )
  block = splash.BranchMask(splash.Columns(prompt, response), width, window)[rows, columns]
  expected = [
    [seen(prompt, response, window, query, key) for key in range(columns.start, columns.stop)]
    for query in range(rows.start, rows.stop)
  ]
  assert np.array_equal(block, np.asarray(expected, bool).reshape(block.shape))


def test_blocks_between_siblings_are_skipped():
  mask = splash.BranchMask(splash.Columns(256, 256), 256 * 9, None)
  kernel = splash._kernel(splash_attention.MultiHeadMask([mask] * 2), 256, None, make_mesh())
  # Of each branch's row of blocks, the trunk and itself are left: two columns instead of nine.
  assert kernel.fwd_mask_info.block_mask.shape == (1, 9, 2)
  assert np.count_nonzero(kernel.fwd_mask_info.block_mask) == 1 + 8 * 2
  assert kernel.fwd_mask_info.partial_mask_blocks is None


@given(some.integers(1, 20_000))
def test_blocks_fit_and_waste_little(tokens):
  block, width = splash._blocks(tokens)
  assert block % splash.LANES == 0 and width % block == 0
  assert 0 <= width - tokens < max(256, tokens / 8)


class Tensors(NamedTuple):
  query: np.ndarray
  key: np.ndarray
  value: np.ndarray


def random_tensors(batch: Branches | Packed, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensors, np.ndarray]:
  """Query, key and value, and a cotangent of the output."""
  random = np.random.default_rng(0)
  shape = real_tokens(batch).shape[:2]
  drawn = [random.normal(size=(*shape, count, head_dim)) for count in (heads, kv_heads, kv_heads, heads)]
  *tensors, cotangent = (array.astype(np.float32) for array in drawn)
  return Tensors(*tensors), cotangent


def program(mesh, masking: Masking):
  """(batch, kind of layer, tensors, cotangent) -> the output and its gradients."""

  @jax.jit
  def run(batch, kind, tensors: Tensors, cotangent):
    layer = masking._replace(kind=kind if len(masking.windows) > 1 else 0)

    def attend(tensors: Tensors):
      over = PackedRows if isinstance(batch, Packed) else TrunkAndBranches
      return over(batch, mesh)(*tensors, masking=layer, layer=0, cache=None)[0]

    out, pull = jax.vjp(attend, tensors)
    return out, *pull(cotangent)

  return run


def paths(monkeypatch, mesh, masking: Masking):
  """The same program by the kernel and by XLA; each is traced at its first call."""

  def path(kernel: bool):
    run = program(mesh, masking)

    def call(*inputs):
      with_kernel(monkeypatch, kernel)
      return run(*inputs)

    return call

  return path(True), path(False)


def assert_equal_paths(kernel, xla, batch: Branches | Packed, kind: int, tensors: Tensors, cotangent) -> None:
  real = real_tokens(batch)
  out, gradients = kernel(batch, kind, tensors, np.where(real, cotangent, 0))
  expected, expected_gradients = xla(batch, kind, tensors, np.where(real, cotangent, 0))
  np.testing.assert_allclose(np.where(real, out, 0), np.where(real, expected, 0), atol=TOLERANCE)
  for ours, theirs in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


MASKINGS = pytest.mark.parametrize(
  ("masking", "head_dim"),
  [
    (Masking(0.1), 128),
    (Masking(0.1, softcap=5.0), 256),
    (Masking(0.1, windows=(40,)), 64),
    (Masking(0.3, softcap=5.0, windows=(40, None)), 16),
  ],
  ids=["plain", "softcap", "window", "local_and_global"],
)


@MASKINGS
def test_kernel_equals_xla(masking, head_dim, one_device, small_blocks, monkeypatch):
  kernel, xla = paths(monkeypatch, one_device, masking)
  for kind in range(len(masking.windows)):
    batch = ragged_batch(kind, rows=2, k=3, prompt=150, response=70)
    assert_equal_paths(kernel, xla, batch, kind, *random_tensors(batch, 4, 2, head_dim))


@MASKINGS
def test_kernel_over_packed_rows_equals_xla(masking, head_dim, one_device, small_blocks, monkeypatch):
  kernel, xla = paths(monkeypatch, one_device, masking)
  for kind in range(len(masking.windows)):
    long = Item(list(range(3, 90)) * 3, [[5] * 70] * 3)
    batch, place = packed_rows([long, *ragged_items(kind, count=12, prompt=120, response=40)], 1024)
    assert batch.tokens.shape == (2, 512) and (place >= 0).sum() > 3
    assert_equal_paths(kernel, xla, batch, kind, *random_tensors(batch, 4, 2, head_dim))


def test_kernel_over_packed_rows_that_are_one_block_equals_xla(one_device, monkeypatch):
  kernel, xla = paths(monkeypatch, one_device, Masking(0.1, softcap=5.0))
  batch, _ = packed_rows([Item(list(range(3, 90)) * 4, [[5] * 130] * 2)], 640)
  assert batch.tokens.shape == (1, 640)  # which none of the blocks divides
  assert_equal_paths(kernel, xla, batch, 0, *random_tensors(batch, 2, 1, 64))


def test_kernel_over_packed_rows_skips_blocks_of_other_items():
  visible = np.zeros((512, 512), bool)
  for start in range(0, 512, 128):
    visible[start : start + 128, start : start + 128] = np.tri(128)
  mesh = make_mesh()
  kernel = splash._kernel(jnp.asarray(visible)[None], 128, None, mesh)
  assert np.count_nonzero(kernel.fwd_mask_info.block_mask) == 4
  assert kernel.fwd_mask_info.block_mask.shape == (1, 4, 4)


def test_kernel_over_packed_rows_on_eight_devices_equals_xla(monkeypatch):
  kernel, xla = paths(monkeypatch, make_mesh(fsdp=2, tensor=4), Masking(0.3))
  batch, place = packed_rows(ragged_items(0, count=12, prompt=60, response=30), 1024, ways=2)
  assert len(place) % 2 == 0
  assert_equal_paths(kernel, xla, batch, 0, *random_tensors(batch, 8, 2, 16))


@pytest.mark.parametrize(
  ("rows", "heads", "kv_heads"),
  [(4, 8, 2), (3, 6, 1)],
  ids=["fewer_key_heads_than_devices", "neither_rows_nor_heads_divide"],
)
def test_kernel_over_eight_devices_equals_xla(rows, heads, kv_heads, monkeypatch):
  kernel, xla = paths(monkeypatch, make_mesh(fsdp=2, tensor=4), Masking(0.3))
  batch = ragged_batch(2, rows=rows)
  assert_equal_paths(kernel, xla, batch, 0, *random_tensors(batch, heads, kv_heads, 16))


def test_kernel_equals_xla_at_any_lengths(one_device, monkeypatch):
  kernel, xla = paths(monkeypatch, one_device, Masking(0.3, windows=(5,)))
  batch = ragged_batch(0, rows=2, k=2)
  tensors = random_tensors(batch, 2, 1, 16)

  @given(trunk=some.tuples(*[some.integers(1, 9)] * 2), branch=some.tuples(*[some.integers(0, 8)] * 4))
  @settings(max_examples=30)
  def at_lengths(trunk, branch):
    lengths = {"trunk_length": np.asarray(trunk), "branch_length": np.asarray(branch).reshape(2, 2)}
    ragged = dataclasses.replace(batch, **lengths)
    assert_equal_paths(kernel, xla, ragged, 0, *tensors)
    # Padding too has a value and a gradient, and whatever they are, they are numbers.
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(kernel(ragged, 0, *tensors)))

  at_lengths()


def test_dpo_gradients_by_kernel_equal_those_by_xla(tmp_path, eight_devices, monkeypatch):
  """Scanned layers of two kinds, with soft cap and rematerialisation, over a mesh."""
  tiny.decoder("gemma2", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32", layout="stacked", remat=True))
  params = model.load(eight_devices)
  pairs, place = packed_rows(ragged_items(4, count=20, k=2), ways=4)
  weight = np.where(place >= 0, np.float32(1 / 20), 0)
  batch = AlignBatch(pairs, np.zeros((*place.shape, 2), np.float32), weight)
  results = []
  for kernel in (True, False):
    with_kernel(monkeypatch, kernel)
    results.append(jax.jit(jax.grad(build_loss(model, eight_devices, Align()), has_aux=True))(params, {}, batch))
  (ours, metrics), (theirs, expected) = results
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, atol=1e-4, err_msg=name)
  scale = max(np.abs(gradient).max() for gradient in theirs.values())
  for name, gradient in theirs.items():
    np.testing.assert_allclose(ours[name], gradient, atol=1e-5 * scale, err_msg=name)


def test_prefill_by_kernel_equals_xla(one_device, monkeypatch):
  batch = prompts_only([[5, 6, 7], [9] * 20, list(range(40))], 40)
  (query, key, value), _ = random_tensors(batch, 4, 2, 16)
  real = np.asarray(batch.trunk_mask)[..., None, None]
  results = []
  for kernel in (True, False):
    with_kernel(monkeypatch, kernel)
    empty = (KV(*(np.zeros((3, 2, 40, 16), np.float32) for _ in range(2))),)
    prefill = functools.partial(Prefill(batch, one_device), masking=Masking(0.3), layer=0, cache=empty)
    out, cache = jax.jit(prefill)(query, key, value)
    results.append((np.where(real, out, 0), cache))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=TOLERANCE), *results)


def test_only_bfloat16_on_a_tpu_takes_the_kernel(one_device):
  tpu = types.SimpleNamespace(devices=np.asarray([[[types.SimpleNamespace(platform="tpu")]]]))
  assert splash.applies(tpu, jnp.bfloat16)
  assert not splash.applies(tpu, jnp.float32)
  assert not splash.applies(one_device, jnp.bfloat16)
  assert not splash.applies(None, jnp.bfloat16)

"""The fused kernel's path against plain XLA attention: on CPUs by what JAX computes in its place, on a GPU itself."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import packed_rows, ragged_batch, ragged_items, real_tokens

from tsalign_jax.ops import fused
from tsalign_jax.ops.attention import PackedRows, TrunkAndBranches
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.types import Branches, Packed

MASKINGS = {
  "plain": Masking(0.3),
  "window": Masking(0.3, None, (9,)),
  "traced window": Masking(0.3, None, (None, 9), 1),
}


def packed_batch() -> Packed:
  return packed_rows(ragged_items(3, count=30, k=2))[0]


def long_trunks() -> Branches:
  """Of more tokens than a block has queries."""
  return ragged_batch(3, rows=2, k=2, prompt=150, response=20)


BATCHES = {"packed rows": packed_batch, "trunks with branches": long_trunks}


def attention(batch: Packed | Branches, masking: Masking, mesh, dtype):
  """What four heads over two of keys attend to in these rows, and the gradients of some function of it."""
  keys = jax.random.split(jax.random.key(0), 4)
  real = real_tokens(batch)
  query, key, value, other = (
    jax.random.normal(each, (*real.shape[:2], heads, 16), dtype) for each, heads in zip(keys, (4, 2, 2, 4), strict=True)
  )
  over = PackedRows if isinstance(batch, Packed) else TrunkAndBranches

  @jax.jit
  def run(kind, query, key, value):
    layer = masking if isinstance(masking.kind, int) and masking.kind == 0 else masking._replace(kind=kind)
    out, _ = over(batch, mesh)(query, key, value, masking=layer, layer=0, cache=None)
    return jnp.where(real, out, 0)

  out, back = jax.vjp(lambda *tensors: run(jnp.asarray(masking.kind), *tensors), query, key, value)
  return out, back(jnp.where(real, other, 0))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_the_fused_path_equals_xla_with_its_gradients(masking, batch, one_device, monkeypatch):
  monkeypatch.setattr(fused, "IMPLEMENTATION", "xla")
  results = []
  for use in (True, False):
    monkeypatch.setattr(fused, "applies", lambda *_, use=use: use)
    results.append(attention(batch(), masking, one_device, jnp.float32))
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5), *results)


def test_each_device_gets_the_key_heads_that_its_query_heads_need(one_device, monkeypatch):
  """Two of keys, which four devices cannot share as they share four of queries."""
  packed = packed_batch()
  monkeypatch.setattr(fused, "IMPLEMENTATION", "xla")
  monkeypatch.setattr(fused, "applies", lambda *_: True)
  kernel, heads, parts = jax.nn.dot_product_attention, [], []

  def seen(*tensors, mask, **how):
    heads.append(tensors[1].shape[2])
    for tensor in (*tensors, mask):
      jax.debug.inspect_array_sharding(
        tensor, callback=lambda split, of=tensor.shape: parts.append(split.shard_shape(of))
      )
    return kernel(*tensors, mask=mask, **how)

  monkeypatch.setattr(jax.nn, "dot_product_attention", seen)
  meshes = (one_device, make_mesh(data=2, fsdp=1, tensor=4))
  alone, split = (attention(packed, MASKINGS["plain"], mesh, jnp.float32) for mesh in meshes)
  assert set(heads) == {2, 4}
  rows, columns = packed.tokens.shape
  of_each = (rows // 2, columns, 1, 16)  # the kernel refuses what is not split alike
  assert parts[-4:] == [of_each, of_each, of_each, (rows // 2, 1, columns, columns)]
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-5), alone, split)


@pytest.mark.accelerator
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
def test_the_kernel_on_a_gpu_equals_xla_to_rounding(masking, batch, monkeypatch):
  mesh = make_mesh()
  if not fused.applies(mesh, jnp.bfloat16, 16, masking):
    pytest.skip("needs an NVIDIA GPU")
  ours = attention(batch(), masking, mesh, jnp.bfloat16)
  monkeypatch.setattr(fused, "applies", lambda *_: False)
  theirs = attention(batch(), masking, mesh, jnp.bfloat16)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(float), b.astype(float), atol=0.06), ours, theirs)


def test_it_is_for_bfloat16_on_nvidia_with_heads_that_it_knows(one_device):
  def mesh(platform, kind, capability=None):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    return types.SimpleNamespace(devices=np.asarray([device]))

  plain, hopper = Masking(0.1), mesh("gpu", "NVIDIA H200", "9.0")
  assert fused.applies(hopper, jnp.bfloat16, 64, plain)
  assert not fused.applies(hopper, jnp.float32, 64, plain)
  assert not fused.applies(hopper, jnp.bfloat16, 256, plain)
  assert not fused.applies(hopper, jnp.bfloat16, 60, plain)
  assert not fused.applies(hopper, jnp.bfloat16, 64, Masking(0.1, softcap=50.0))
  assert fused.applies(mesh("gpu", "NVIDIA B200", "10.0"), jnp.bfloat16, 64, plain)
  assert not fused.applies(mesh("gpu", "NVIDIA T4", "7.5"), jnp.bfloat16, 64, plain)
  assert not fused.applies(mesh("gpu", "AMD Instinct MI300X"), jnp.bfloat16, 64, plain)
  assert not fused.applies(mesh("tpu", "TPU v5e"), jnp.bfloat16, 64, plain)
  assert not fused.applies(one_device, jnp.bfloat16, 64, plain)
  assert not fused.applies(None, jnp.bfloat16, 64, plain)

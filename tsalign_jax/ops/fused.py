"""Attention of packed rows as one fused kernel on NVIDIA GPUs: cuDNN's, which JAX offers.

It never holds the attention weights of a row, though it does hold the row's mask, and it computes what the mask hides.
So trunks with branches, whose siblings hide most of each other, stay with XLA, which does not compute them.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import is_nvidia, partition_spec

LONGEST_HEAD = 128  # the limit of GPUs before Hopper
IMPLEMENTATION = "cudnn"
AXES = ("batch", None, "heads", None)
KV_AXES = ("batch", None, "kv_heads", None)


def applies(mesh: Mesh | None, dtype, head_dim: int, masking: Masking) -> bool:
  """Whether the kernel computes attention on this mesh: in bfloat16, without soft cap, with heads that it knows."""
  knows = head_dim <= LONGEST_HEAD and head_dim % 8 == 0 and masking.softcap is None
  return knows and dtype == jnp.bfloat16 and mesh is not None and is_nvidia(mesh)


def attend_packed(
  query: Float[Array, "rows columns heads head_dim"],
  key: Float[Array, "rows columns kv_heads head_dim"],
  value: Float[Array, "rows columns kv_heads head_dim"],
  visible: Bool[Array, "rows columns columns"],
  scale: float,
  mesh: Mesh,
) -> Float[Array, "rows columns heads head_dim"]:
  """Softmax attention of each token over what is visible to it."""
  if partition_spec(AXES, query.shape, mesh) != partition_spec(KV_AXES, key.shape, mesh):
    # Fewer key heads than devices: each device needs its own.
    key, value = (jnp.repeat(array, query.shape[2] // key.shape[2], axis=2) for array in (key, value))
  return jax.nn.dot_product_attention(
    query, key, value, mask=visible[:, None], scale=scale, implementation=IMPLEMENTATION
  )

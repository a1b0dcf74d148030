"""Attention of packed rows and of trunks as one fused kernel on NVIDIA GPUs: cuDNN's, which JAX offers.

It never holds the attention weights of a row, though it does hold the row's mask, and it computes what the mask hides.
So branches, which see none of their siblings, stay with XLA, which does not compute those.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tsalign_jax.ops.heads import placed
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import constrain_batch, is_nvidia

LONGEST_HEAD = 128  # the limit of GPUs before Hopper
IMPLEMENTATION = "cudnn"
LEAST_CAPABILITY = 8.0  # of compute: Ampere and later


def applies(mesh: Mesh | None, dtype, head_dim: int, masking: Masking) -> bool:
  """Whether the kernel computes attention on this mesh: in bfloat16, without soft cap, with heads that it knows."""
  knows = head_dim <= LONGEST_HEAD and head_dim % 8 == 0 and masking.softcap is None
  if not (knows and dtype == jnp.bfloat16 and mesh is not None and is_nvidia(mesh)):
    return False
  return all(float(device.compute_capability) >= LEAST_CAPABILITY for device in mesh.devices.flat)


def attend(
  query: Float[Array, "rows columns heads head_dim"],
  key: Float[Array, "rows columns kv_heads head_dim"],
  value: Float[Array, "rows columns kv_heads head_dim"],
  visible: Bool[Array, "rows columns columns"],
  scale: float,
  mesh: Mesh,
) -> Float[Array, "rows columns heads head_dim"]:
  """Softmax attention of each token over what is visible to it."""
  query, key, value = placed(query, key, value, mesh)  # the kernel refuses what is split otherwise
  mask = constrain_batch(visible[:, None], mesh)
  return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=IMPLEMENTATION)

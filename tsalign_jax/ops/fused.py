"""Attention of packed rows as one fused kernel on NVIDIA GPUs: cuDNN's, which JAX offers.

It never holds the attention weights of a whole row, but it computes those that the mask hides. So trunks with branches,
whose siblings hide most of each other, stay with XLA, which does not compute them.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import is_nvidia

LONGEST_HEAD = 128  # the limit of GPUs before Hopper
IMPLEMENTATION = "cudnn"


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
) -> Float[Array, "rows columns heads head_dim"]:
  """Softmax attention of each token over what is visible to it."""
  return jax.nn.dot_product_attention(
    query, key, value, mask=visible[:, None], scale=scale, implementation=IMPLEMENTATION
  )

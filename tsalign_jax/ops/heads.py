"""Queries, keys and values, placed for a kernel that has a part of the rows and of the heads on each device."""

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tsalign_jax.parallel.mesh import constrain, partition_spec

AXES = ("batch", None, "heads", None)
KV_AXES = ("batch", None, "kv_heads", None)


def placed(
  query: Float[Array, "rows columns heads head_dim"],
  key: Float[Array, "rows columns kv_heads head_dim"],
  value: Float[Array, "rows columns kv_heads head_dim"],
  mesh: Mesh,
) -> tuple[Float[Array, "rows columns heads head_dim"], ...]:
  """The three, split alike: key heads that are fewer than the devices are repeated, so that each has those it needs."""
  if partition_spec(AXES, query.shape, mesh) != partition_spec(KV_AXES, key.shape, mesh):
    key, value = (jnp.repeat(array, query.shape[2] // key.shape[2], axis=2) for array in (key, value))
  return tuple(constrain(array, AXES, mesh) for array in (query, key, value))

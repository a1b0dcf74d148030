"""Attention of trunks with their branches as one block-sparse kernel: Pallas splash attention, on TPUs.

In a batch of trunks and branches, tokens lie as [trunk | branch | branch | ...]. What a token may see is known before
any prompt is: a trunk ends where its branches begin, so the distance from branch column r back to trunk column p is
(prompt - p) + r whatever the prompt's length. Causality, siblings and sliding windows are therefore one static mask, of
which the kernel skips every empty block; only the padding before a trunk differs by row, and that is told by segment
ids. (The padding after a branch needs nothing: no real token looks forward.)

In packed rows, who sees whom is data: the kernel gets a mask for each row, and skips what is empty in that.

Every token sees at least itself, padding included, so no softmax is empty and all values and gradients are finite.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.data.batching import round_up
from tsalign_jax.ops.heads import placed
from tsalign_jax.ops.masking import Masking
from tsalign_jax.parallel.mesh import partition_spec, platform

LANES = 128  # block sizes are multiples of it
BLOCKS = (512, 384, 256)
AXES = ("batch", "heads", None, None)
COLUMN_BITS = 20  # a query's code holds its column below and its branch above: 2^20 tokens, 2^11 branches


def applies(mesh: Mesh | None, dtype) -> bool:
  """Whether attention on this mesh and in this dtype is computed by the kernel.

  The platform is that of the mesh, not of the machine that traces, so a program compiled for a TPU topology on a CPU
  is the one that runs there. Float32 stays with XLA, whose products are then float32: the kernel rounds to bfloat16.
  """
  return mesh is not None and platform(mesh) == "tpu" and dtype == jnp.bfloat16


class Columns(NamedTuple):
  """Columns of the trunk and of each branch, padding included; a batch without branches has 0 of the latter."""

  prompt: int
  response: int


@dataclasses.dataclass(frozen=True)
class BranchMask(splash_attention.Mask):
  """Who sees whom in [trunk | branches], computed block by block and again inside the kernel; nothing is stored.

      trunk of 2, branches of 2     key  p p a a b b
                                    p    1
                                    p    1 1
                                    a    1 1 1
                                    a    1 1 1 1
                                    b    1 1 . . 1
                                    b    1 1 . . 1 1

  Columns after the last branch, which fill up the last block, are as many more branches.
  """

  columns: Columns
  width: int
  window: int | None

  @property
  def shape(self) -> tuple[int, int]:
    """(queries, keys)."""
    return self.width, self.width

  @property
  def q_sequence(self) -> Int[np.ndarray, " width"]:
    """The code of each query, from which `mask_function` reads its column and its branch."""
    column = np.arange(self.width, dtype=np.int32)
    branch = np.maximum(column - self.columns.prompt, 0) // (self.columns.response or self.width)
    return column | branch << COLUMN_BITS

  def mask_function(self, query, key):
    """Whether each query, given by its code, sees each key, given by its column; of numpy or of traced arrays."""
    column = query & (1 << COLUMN_BITS) - 1
    skipped = (query >> COLUMN_BITS) * self.columns.response  # columns of earlier siblings
    nearest = self.columns.prompt + skipped  # first column of the query's own branch
    in_trunk = key < self.columns.prompt
    if self.window is None:
      return (key <= column) & (in_trunk | (key >= nearest))
    after = column - self.window
    return (key <= column) & (key > after - skipped) & (in_trunk | (key >= nearest) & (key > after))

  def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
    rows, columns = (np.arange(self.width, dtype=np.int32)[part] for part in block)
    return self.mask_function(self.q_sequence[rows][:, None], columns[None])


def attend_tokens(
  query: Float[Array, "batch tokens heads head_dim"],
  key: Float[Array, "batch tokens kv_heads head_dim"],
  value: Float[Array, "batch tokens kv_heads head_dim"],
  trunk_length: Int[Array, " batch"],
  columns: Columns,
  masking: Masking,
  mesh: Mesh,
) -> Float[Array, "batch tokens heads head_dim"]:
  """Softmax attention of each token over the trunk and the branch that it belongs to, causal.

  Rows and heads are split as the rules of the mesh say, and each device runs the kernel on its own part. Without a
  TPU the kernel is interpreted, which is for tests.
  """
  tokens = query.shape[1]
  block, width = _blocks(tokens)

  def attend(query, key, value, trunk_length, window):
    mask = splash_attention.MultiHeadMask([BranchMask(columns, width, window)] * query.shape[1])
    kernel = _kernel(mask, block, masking.softcap, mesh)
    segment = (jnp.arange(width) >= columns.prompt - trunk_length[:, None]).astype(jnp.int32)
    return jax.vmap(kernel)(query, key, value, splash_attention.SegmentIds(segment, segment))

  padded = (jnp.pad(array, ((0, 0), (0, width - tokens), (0, 0), (0, 0))) for array in (query, key, value))
  return _on_each_device(attend, *padded, (trunk_length,), masking, mesh)[:, :tokens]


def attend_packed(
  query: Float[Array, "rows columns heads head_dim"],
  key: Float[Array, "rows columns kv_heads head_dim"],
  value: Float[Array, "rows columns kv_heads head_dim"],
  visible: Bool[Array, "rows columns columns"],
  position: Int[Array, "rows columns"],
  masking: Masking,
  mesh: Mesh,
) -> Float[Array, "rows columns heads head_dim"]:
  """Softmax attention of each token over what is visible to it, less what lies before its window.

  Columns that no block divides are one block. Every token sees itself at least.
  """
  columns = query.shape[1]
  block = next(block for block in (*BLOCKS, columns) if columns % block == 0)

  def attend(query, key, value, visible, position, window):
    def row(inputs):
      query, key, value, visible, position = inputs
      if window is not None:
        visible = visible & (position[:, None] - position < window)
      return _kernel(visible[None], block, masking.softcap, mesh)(query, key, value)

    return jax.lax.map(row, (query, key, value, visible, position))

  return _on_each_device(attend, query, key, value, (visible, position), masking, mesh)


def _on_each_device(attend: Callable, query, key, value, of_rows: tuple[Array, ...], masking: Masking, mesh: Mesh):
  """`attend`, with the heads before the tokens, of the part of rows and heads that each device has."""
  query = (query.astype(jnp.float32) * masking.scale).astype(query.dtype)
  query, key, value = (jnp.swapaxes(array, 1, 2) for array in placed(query, key, value, mesh))
  split = partition_spec(AXES, query.shape, mesh)

  def local(kind, *inputs):
    return jax.lax.switch(kind, [functools.partial(attend, window=window) for window in masking.windows], *inputs)

  rows_split = [partition_spec(("batch", *[None] * (array.ndim - 1)), array.shape, mesh) for array in of_rows]
  out = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(), split, split, split, *rows_split),
    out_specs=split,
    check_vma=False,  # the kernel does not say over which mesh axes its results vary
  )(masking.kind, query, key, value, *of_rows)
  return jnp.swapaxes(out, 1, 2)


def _blocks(tokens: int) -> tuple[int, int]:
  """(block size, tokens rounded up to it): the largest block that adds an eighth at most, or else adds least."""
  if tokens <= BLOCKS[0]:
    width = round_up(tokens, LANES)
    return width, width
  block = min(BLOCKS, key=lambda block: (max(round_up(tokens, block), 1.125 * tokens), -block))
  return block, round_up(tokens, block)


def _kernel(mask: splash_attention.MultiHeadMask | Array, block: int, softcap: float | None, mesh: Mesh):
  """The kernel with a mask that is known, or with one [1, tokens, tokens] for all heads that is not."""
  sizes = splash_attention.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
  )
  kernel = splash_attention.make_splash_mha(
    mask,
    block_sizes=sizes,
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
    interpret=platform(mesh) != "tpu",
  )
  if isinstance(mask, jax.Array):  # there is a flag that it is not known, made an array: asked in a program, it fails
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=None)
  return kernel

"""The policy's programs: log-probabilities of branches, and the DPO loss over them."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tsalign_jax.config import Align
from tsalign_jax.data.packing import Packing
from tsalign_jax.models.functional import Params
from tsalign_jax.models.heads import LanguageModel
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.models.lora import adapted_skeleton
from tsalign_jax.objectives import dpo
from tsalign_jax.ops.attention import PackedRows
from tsalign_jax.ops.logprobs import CHUNK, PART, token_logprobs_of_devices
from tsalign_jax.parallel.mesh import constrain_batch, pipelined, put_batch
from tsalign_jax.training.optimizer import ROUND_ALIKE
from tsalign_jax.types import Packed


class AlignBatch(NamedTuple):
  """Packed pairs (chosen first), the reference's log-probabilities, and 1 / (pairs in the whole step), 0 for none."""

  pairs: Packed
  reference_logps: Float[Array, "rows items 2"]
  weight: Float[Array, "rows items"]


def branch_logps(
  language_model: LanguageModel, batch: Packed, model: ModelHandle, mesh: Mesh
) -> Float[Array, "rows items k"]:
  """log p(branch | trunk) in nats, at temperature 1: only branch tokens pay the vocabulary projection."""
  hidden, _ = language_model.model(
    batch.tokens, batch.position, PackedRows(batch, mesh), dtype=model.dtype, remat=model.remat
  )
  by_device = constrain_batch(hidden, mesh).reshape(len(batch.predictor), -1, hidden.shape[-1])
  predicting = jnp.take_along_axis(constrain_batch(by_device, mesh), batch.predictor[..., None], axis=1)
  apart = model.layout == "unrolled"
  with jax.named_scope("token_logprobs"):
    logps = token_logprobs_of_devices(
      predicting,
      language_model.head(),
      batch.target,
      mesh,
      softcap=model.config.logit_softcap,
      chunk=None if apart else CHUNK,
      part=PART if apart else None,
    )
  branches = batch.length.size // len(batch.owner)
  of_branch = batch.owner[..., None] == jnp.arange(branches)
  sums = jnp.where(of_branch, logps[..., None], 0.0).sum(axis=1)
  return sums.reshape(batch.length.shape)


@functools.lru_cache(maxsize=8)
def build_reference(model: ModelHandle, mesh: Mesh):
  """The program (params, packed) -> log-probabilities [rows, items, k]: the training forward pass without its loss."""

  @functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
  def program(params: Params, batch: Packed):
    return branch_logps(model.skeleton.bind(params), batch, model, mesh)

  return program


def known_logps(
  program, params: Params, packing: Packing, steps: Iterable[Sequence[int]], mesh: Mesh
) -> Float[np.ndarray, "items k"]:
  """Log-probabilities of all items by a program of `build_reference`, packed as the steps of training will pack them.

  Steps after the first pass over the items are not looked at.
  """

  def launched():
    missing = set(range(len(packing.items)))
    for step in steps:
      if not missing:
        break
      missing.difference_update(step)
      for packed, place in packing.batches(step):
        yield place, program(params, put_batch(packed, mesh))

  out = np.full((len(packing.items), packing.layout.k), np.nan, np.float32)
  for place, logps in pipelined(launched()):
    new = (place >= 0) & np.isnan(out[place]).any(-1)
    out[place[new]] = np.asarray(logps)[new]
  return out


def make_batches(packing: Packing, step: Sequence[int], reference: np.ndarray, mesh: Mesh) -> Iterator[AlignBatch]:
  """The microbatches of a step over these pairs, on the device."""
  for packed, place in packing.batches(step):
    weight = np.where(place >= 0, np.float32(1 / len(step)), np.float32(0))
    yield put_batch(AlignBatch(packed, reference[place], weight), mesh)


@functools.lru_cache(maxsize=8)
def build_loss(model: ModelHandle, mesh: Mesh, align: Align):
  """The DPO loss of a microbatch, and TRL's metrics summed with its weights."""
  skeleton = adapted_skeleton(model, align.lora)

  def loss(trainable: Params, frozen: Params, batch: AlignBatch):
    logps = branch_logps(skeleton.bind({**frozen, **trainable}), batch.pairs, model, mesh)
    logps, reference, length = (a.reshape(-1, 2) for a in (logps, batch.reference_logps, batch.pairs.length))
    losses = dpo.sigmoid(logps - reference, beta=align.beta, label_smoothing=align.label_smoothing)
    if align.sft_weight:
      losses = losses + align.sft_weight * dpo.sft(logps, length)
    metrics = dpo.metrics(logps, reference, beta=align.beta) | {"loss": losses}
    total = {name: jnp.sum(batch.weight.reshape(-1) * value) for name, value in metrics.items()}
    return total["loss"], total

  return loss

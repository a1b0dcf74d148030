"""The policy's programs: log-probabilities of branches, and the DPO loss over them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tsalign_jax.config import Align
from tsalign_jax.models.functional import Params
from tsalign_jax.models.heads import LanguageModel
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.models.lora import adapted_skeleton
from tsalign_jax.objectives import dpo
from tsalign_jax.ops.attention import TrunkAndBranches, flatten
from tsalign_jax.ops.logprobs import token_logprobs
from tsalign_jax.parallel.mesh import constrain_batch
from tsalign_jax.types import Branches


class AlignBatch(NamedTuple):
  """Pairs as branches (chosen first), the reference's log-probabilities, and 1 / (pairs in the whole step)."""

  pairs: Branches
  reference_logps: Float[Array, "batch 2"]
  weight: Float[Array, " batch"]


def branch_logps(
  language_model: LanguageModel, batch: Branches, model: ModelHandle, mesh: Mesh
) -> Float[Array, "batch k"]:
  """log p(branch | trunk) in nats, at temperature 1: only branch tokens pay the vocabulary projection."""
  attend = TrunkAndBranches(batch, mesh)
  hidden, _ = language_model.model(*flatten(batch), attend, dtype=model.dtype, remat=model.remat)
  hidden = constrain_batch(hidden, mesh)
  rows, k, response = batch.branches.shape
  prompt = batch.trunk.shape[1]
  # The token at column r is predicted at column r - 1, the first one at the end of the trunk.
  last = jnp.broadcast_to(hidden[:, None, prompt - 1 : prompt], (rows, k, 1, hidden.shape[-1]))
  before = hidden[:, prompt:].reshape(rows, k, response, -1)[:, :, :-1]
  predicting = jnp.concatenate([last, before], axis=2)
  with jax.named_scope("token_logprobs"):
    logps = token_logprobs(
      predicting.reshape(-1, hidden.shape[-1]),
      language_model.head(model.dtype),
      batch.branches.reshape(-1),
      softcap=model.config.logit_softcap,
      unroll=model.layout == "unrolled",
    )
  return jnp.sum(jnp.where(batch.branch_mask, logps.reshape(batch.branches.shape), 0.0), axis=-1)


@functools.lru_cache(maxsize=8)
def build_reference(model: ModelHandle, mesh: Mesh):
  """The program (params, pairs) -> log-probabilities [batch, k]: the training forward pass, without its loss."""

  @jax.jit
  def program(params: Params, batch: Branches):
    return branch_logps(model.skeleton.bind(params), batch, model, mesh)

  return program


@functools.lru_cache(maxsize=8)
def build_loss(model: ModelHandle, mesh: Mesh, align: Align):
  """The DPO loss of a microbatch, and TRL's metrics summed with its weights."""
  skeleton = adapted_skeleton(model, align.lora)

  def loss(trainable: Params, frozen: Params, batch: AlignBatch):
    logps = branch_logps(skeleton.bind({**frozen, **trainable}), batch.pairs, model, mesh)
    losses = dpo.sigmoid(logps - batch.reference_logps, beta=align.beta, label_smoothing=align.label_smoothing)
    if align.sft_weight:
      losses = losses + align.sft_weight * dpo.sft(logps, batch.pairs.branch_length)
    metrics = dpo.metrics(logps, batch.reference_logps, beta=align.beta) | {"loss": losses}
    total = {name: jnp.sum(batch.weight * value) for name, value in metrics.items()}
    return total["loss"], total

  return loss

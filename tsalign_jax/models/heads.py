"""A backbone with a head: next-token logits, or one reward for each branch (each text, for an encoder)."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import DecoderConfig, EncoderConfig
from tsalign_jax.models.decoder import Decoder, Layout
from tsalign_jax.models.encoder import Encoder
from tsalign_jax.models.layers import LayerNorm, Linear, activate
from tsalign_jax.ops.attention import PackedRows, TrunkAndBranches, flatten
from tsalign_jax.ops.einsum import soft_cap, wide_dot, wide_matmul
from tsalign_jax.types import Branches, Packed, Texts


class LanguageModel(nnx.Module):
  """A decoder with the vocabulary projection, its own or the embeddings'."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, layout: Layout = "unrolled"):
    self.config = config
    self.model = Decoder(config, rngs, layout)
    self.lm_head = None if config.tied else Linear({"embed": config.embed}, {"vocab": config.vocab}, rngs)

  def head(self) -> Float[Array, "embed vocab"]:
    """The vocabulary projection, in the dtype that it is stored in."""
    return self.model.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

  def logits(self, hidden: Float[Array, "*batch embed"], head: Float[Array, "embed vocab"]):
    """Next-token logits in float32, soft-capped where the model is."""
    return soft_cap(wide_dot(hidden, head), self.config.logit_softcap)


class DecoderRewardModel(nnx.Module):
  """A decoder that gives each branch one score, read at its last real token."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, layout: Layout = "unrolled"):
    self.config = config
    self.model = Decoder(config, rngs, layout)
    self.score = Linear({"embed": config.embed}, {"label": 1}, rngs)

  def __call__(self, batch: Branches | Packed, **how) -> Float[Array, "batch k"] | Float[Array, "rows items k"]:
    """The reward of each branch; where a branch is empty, that of its trunk. Keywords are those of `features`."""
    return _reward(self.score, self.features(batch, **how))

  def features(
    self, batch: Branches | Packed, *, mesh: Mesh | None = None, dtype=jnp.float32, remat: bool = False
  ) -> Float[Array, "batch k embed"] | Float[Array, "rows items k embed"]:
    """What the head reads of each branch: the hidden state of its last real token."""
    if isinstance(batch, Packed):
      tokens, attend, last = (batch.tokens, batch.position), PackedRows(batch, mesh), _last_packed(batch)
    else:
      tokens, attend, last = flatten(batch), TrunkAndBranches(batch, mesh), _last(batch)
    hidden, _ = self.model(*tokens, attend, dtype=dtype, remat=remat)
    at_last = jnp.take_along_axis(hidden, last.reshape(last.shape[0], -1)[..., None], axis=1)
    return at_last.reshape(*last.shape, -1)


def _last(batch: Branches) -> Int[Array, "batch k"]:
  """The column of each branch's last token, among the trunk's and all branches' columns."""
  prompt = batch.trunk.shape[1]
  _, k, response = batch.branches.shape
  last = prompt + jnp.arange(k) * response + batch.branch_length - 1
  return jnp.where(batch.branch_length > 0, last, prompt - 1)


def _last_packed(batch: Packed) -> Int[Array, "rows items k"]:
  """The column of the last token of each item's branches; 0 where a row has no such item."""
  _, items, k = batch.length.shape
  of_item = batch.item[:, None, None] == jnp.arange(1, items + 1)[:, None, None]
  seen = of_item & ((batch.branch[:, None, None] == jnp.arange(1, k + 1)[:, None]) | (batch.branch[:, None, None] == 0))
  return jnp.where(seen, jnp.arange(batch.tokens.shape[1]), 0).max(-1)


class EncoderRewardModel(nnx.Module):
  """An encoder that gives each text one score: transformers' `...ForSequenceClassification` with one label.

  The families differ in names only: what is `dense` here is BERT's pooler, RoBERTa's `classifier.dense` and
  ModernBERT's `head.dense`; of them, only ModernBERT has a `norm`.
  """

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.config = config
    self.model = Encoder(config, rngs)
    pooled = {"pooled": config.embed}
    self.dense = Linear({"embed": config.embed}, pooled, rngs, bias=config.classifier_bias)
    modern = config.family == "modernbert"
    self.norm = LayerNorm(config.embed, config.norm_eps, bias=config.norm_bias) if modern else None
    self.out = Linear(pooled, {"label": 1}, rngs, bias=True)

  def __call__(self, texts: Texts, **how) -> Float[Array, "items k"]:
    """The reward of each response. Keywords are those of `features`."""
    return _reward(self.out, self.features(texts, **how))

  def features(
    self, texts: Texts, *, mesh: Mesh | None = None, dtype=jnp.float32, remat: bool = False
  ) -> Float[Array, "items k pooled"]:
    """What the last map reads of each response's text: its first token or, if configured so, the mean of all."""
    first_only = self.config.pooling == "cls"
    hidden = self.model(texts, first_only=first_only, mesh=mesh, dtype=dtype, remat=remat)
    pooled = hidden if first_only else _means(hidden, texts)
    pooled = pooled.reshape(-1, pooled.shape[-1])[texts.place]
    pooled = activate(self.config.classifier_activation, self.dense(pooled))
    return pooled if self.norm is None else self.norm(pooled)


def _reward(head: Linear, pooled: Float[Array, "*batch embed"]) -> Float[Array, "*batch"]:
  """A head's one output, in float32: rounded to bfloat16, different responses would often tie."""
  reward = wide_dot(pooled, head.kernel[...])[..., 0]
  return reward if head.bias is None else reward + head.bias[...].astype(jnp.float32)


def _means(hidden: Float[Array, "rows columns embed"], texts: Texts) -> Float[Array, "rows texts embed"]:
  """The mean of each text's hidden states, summed in float32."""
  of_text = texts.text[:, None, :] == jnp.arange(1, texts.first.shape[1] + 1)[:, None]
  total = wide_matmul(of_text.astype(hidden.dtype), hidden)
  return (total / jnp.maximum(of_text.sum(-1, keepdims=True), 1)).astype(hidden.dtype)

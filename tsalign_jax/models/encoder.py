"""One encoder for BERT, RoBERTa and ModernBERT, driven by its configuration.

Layers are always unrolled: encoders are small, and ModernBERT's first layer lacks a norm that the others have.
"""

import functools
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tsalign_jax.models.config import EncoderConfig
from tsalign_jax.models.layers import Embedding, LayerNorm, Linear, Rotation, activate, rotate, rotation
from tsalign_jax.ops.attention import lay_out, meet
from tsalign_jax.ops.einsum import heads_first
from tsalign_jax.ops.order import CACHED, after, on_one_cpu
from tsalign_jax.types import UserError


class Attend(Protocol):
  """How the queries of one layer meet its keys: rotated or not, near or far, never at padding."""

  def __call__(self, query, key, value):
    """The output, shaped like query [rows, length, heads, head_dim]."""
    ...


class Embeddings(nnx.Module):
  """Token vectors, with those of absolute positions and of token types where the family has them; then a norm."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.config = config
    self.word_embeddings = Embedding({"vocab": config.vocab}, config.embed, rngs)
    positions, types = {"positions": config.max_positions}, {"types": config.type_vocab}
    self.position_embeddings = None if config.ropes else Embedding(positions, config.embed, rngs)
    self.token_type_embeddings = Embedding(types, config.embed, rngs) if config.type_vocab else None
    self.norm = LayerNorm(config.embed, config.norm_eps, bias=config.norm_bias)

  def __call__(self, tokens, token_types, dtype):
    """The normed sum of the embeddings of each token."""
    x = self.word_embeddings(tokens, dtype)
    if self.token_type_embeddings is not None:
      x = x + self.token_type_embeddings(jnp.zeros_like(tokens) if token_types is None else token_types, dtype)
    if self.position_embeddings is not None:
      x = x + self.position_embeddings(self._positions(tokens.shape[1]), dtype)
    return self.norm(x)

  def _positions(self, length: int) -> Int[Array, " length"]:
    longest = self.config.max_tokens
    if length > longest:  # positions beyond the table would be read as its last one, without an error
      raise UserError(f"sequences of {length} tokens: this {self.config.family} has positions for {longest}")
    return jnp.arange(length) + self.config.first_position


class BertLayer(nnx.Module):
  """BERT's and RoBERTa's layer: attention and feed-forward, the sum with their input normed after each."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    embed, mlp = {"embed": config.embed}, {"mlp": config.mlp}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    self.query = Linear(embed, heads, rngs, bias=True)
    self.key = Linear(embed, heads, rngs, bias=True)
    self.value = Linear(embed, heads, rngs, bias=True)
    self.attention_output = Linear(heads, embed, rngs, bias=True)
    self.attention_norm = LayerNorm(config.embed, config.norm_eps)
    self.up = Linear(embed, mlp, rngs, bias=True)
    self.down = Linear(mlp, embed, rngs, bias=True)
    self.output_norm = LayerNorm(config.embed, config.norm_eps)
    self.activation = config.activation

  def __call__(self, x, attend: Attend, wanted: int | None = None):
    """The hidden states after this layer: of all tokens, or of so many first ones."""
    asking = x[:, :wanted]
    x = self.attention_norm(asking + self.attention_output(attend(self.query(asking), self.key(x), self.value(x))))
    return self.output_norm(x + self.down(activate(self.activation, self.up(x))))


class ModernBertLayer(nnx.Module):
  """ModernBERT's layer: attention and gated feed-forward, each behind a norm, their projections fused."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, *, first: bool):
    embed, mlp = {"embed": config.embed}, {"mlp": config.mlp}
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    norm = functools.partial(LayerNorm, config.embed, config.norm_eps, bias=config.norm_bias)
    self.attn_norm = None if first else norm()  # what the first layer reads, the embeddings have just normed
    self.attn_qkv = Linear(embed, {"qkv": 3, **heads}, rngs, bias=config.attention_bias)
    self.attn_out = Linear(heads, embed, rngs, bias=config.attention_bias)
    self.mlp_norm = norm()
    self.mlp_in = Linear(embed, {"gate": 2, **mlp}, rngs, bias=config.mlp_bias)
    self.mlp_out = Linear(mlp, embed, rngs, bias=config.mlp_bias)
    self.activation = config.activation

  def __call__(self, x, attend: Attend, wanted: int | None = None):
    """The hidden states after this layer: of all tokens, or of so many first ones."""
    query, key, value = jnp.moveaxis(self.attn_qkv(x if self.attn_norm is None else self.attn_norm(x)), 2, 0)
    x = x[:, :wanted] + self.attn_out(attend(query[:, :wanted], key, value))
    activated, factor = jnp.moveaxis(self.mlp_in(self.mlp_norm(x)), 2, 0)
    return x + self.mlp_out(activate(self.activation, activated, factor))


class Encoder(nnx.Module):
  """Embeddings, layers and, in ModernBERT, a final norm. The reward head is apart: see `EncoderRewardModel`."""

  def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
    self.config = config
    modern = config.family == "modernbert"
    self.embeddings = Embeddings(config, rngs)
    if modern:
      layers = [ModernBertLayer(config, rngs, first=index == 0) for index in range(config.layers)]
    else:
      layers = [BertLayer(config, rngs) for _ in range(config.layers)]
    self.layers = nnx.List(layers)
    self.final_norm = LayerNorm(config.embed, config.norm_eps, bias=config.norm_bias) if modern else None

  def __call__(
    self,
    tokens: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"],
    token_types: Int[Array, "rows length"] | None = None,
    *,
    wanted: int | None = None,
    mesh: Mesh | None = None,
    dtype=jnp.float32,
    remat: bool = False,
  ) -> Float[Array, "rows wanted embed"]:
    """Hidden states of right-padded rows; `mask` is True at real tokens, and no real token sees the padding.

    `wanted` is of how many first tokens they are wanted; None is of all. The last layer computes no others.
    `token_types` tells the two texts of a BERT pair apart; without it every token is of the first.
    Raises UserError where rows are longer than the model has positions for.
    """
    x = self.embeddings(tokens, token_types, dtype)
    for index, (layer, attend) in enumerate(zip(self.layers, self._attends(mask, on_one_cpu(mesh)), strict=True)):
      some = wanted if index == len(self.layers) - 1 else None
      x = _rematerialised(layer, x, attend, some) if remat else layer(x, attend, some)
    return x if self.final_norm is None else self.final_norm(x)

  def _attends(self, mask, in_turn: bool) -> list[Attend]:
    position = jnp.arange(mask.shape[1])
    turns = [rotation(rope, self.config.head_dim, position[None], position.shape[0]) for rope in self.config.ropes]
    visible = {window: _visible(mask, window) for window in dict.fromkeys(self.config.windows)}
    return [
      functools.partial(attention, visible=visible[window], turn=None if rope is None else turns[rope], in_turn=in_turn)
      for window, rope in zip(self.config.windows, self.config.layer_ropes, strict=True)
    ]


def _rematerialised(layer, x, attend: Attend, wanted: int | None):
  # A function of its own, because nnx.remat would trace `attend` if it were an argument.
  return nnx.remat(lambda layer, x: layer(x, attend, wanted))(layer, x)


def attention(
  query: Float[Array, "rows wanted heads head_dim"],
  key: Float[Array, "rows length heads head_dim"],
  value: Float[Array, "rows length heads head_dim"],
  *,
  visible: Bool[Array, " rows #length length"],
  turn: Rotation | None = None,
  in_turn: bool = False,
) -> Float[Array, "rows wanted heads head_dim"]:
  """Softmax attention of the first tokens' queries over the keys that each may see; `turn` rotates by position.

  `in_turn` computes a few rows after the other, whose logits stay in a CPU's caches.
  """
  rows, wanted, heads, _ = query.shape
  visible = visible[:, :wanted]
  if turn is not None:
    query, key = rotate(query, Rotation(*(part[:, :wanted] for part in turn))), rotate(key, turn)
  at_once = max(1, CACHED // (heads * wanted * key.shape[1])) if in_turn else rows
  out = []
  for start in range(0, rows, at_once):
    some = slice(start, start + at_once)
    asking = after(out[-1], query[some]) if out else query[some]
    met = meet(heads_first(asking), *lay_out(key[some], value[some]), visible[some], scale=query.shape[-1] ** -0.5)
    out.append(jnp.swapaxes(met.normalised(), 1, 2).astype(query.dtype))
  return jnp.concatenate(out)


def _visible(mask, window: int | None) -> Bool[Array, " rows #length length"]:
  """Which keys each query may see: real tokens, at most `window` to either side."""
  if window is None:
    return mask[:, None, :]
  position = jnp.arange(mask.shape[1])
  return mask[:, None, :] & (jnp.abs(position[:, None] - position) <= window)

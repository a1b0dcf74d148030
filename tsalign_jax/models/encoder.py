"""One encoder for BERT, RoBERTa and ModernBERT, driven by its configuration.

Layers are always unrolled: encoders are small, and ModernBERT's first layer lacks a norm that the others have.
"""

import functools
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from tsalign_jax.models.config import EncoderConfig
from tsalign_jax.models.layers import Embedding, LayerNorm, Linear, Rotation, activate, rotate, rotation
from tsalign_jax.ops.attention import lay_out, meet
from tsalign_jax.ops.einsum import heads_first
from tsalign_jax.ops.order import CACHED, after, on_one_cpu
from tsalign_jax.types import Texts

Columns = Int[Array, "rows wanted"]


class Attend(Protocol):
  """How the queries of one layer meet its keys: rotated or not, near or far, only in their own text."""

  def __call__(self, query, key, value):
    """The output, shaped like query [rows, wanted, heads, head_dim]."""
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

  def __call__(self, texts: Texts, dtype):
    """The normed sum of the embeddings of each token."""
    x = self.word_embeddings(texts.tokens, dtype)
    if self.token_type_embeddings is not None:
      types = texts.types if self.config.type_vocab > 1 else jnp.zeros_like(texts.tokens)
      x = x + self.token_type_embeddings(types, dtype)
    if self.position_embeddings is not None:
      x = x + self.position_embeddings(texts.position + self.config.first_position, dtype)
    return self.norm(x)


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

  def __call__(self, x, attend: Attend, wanted: Columns | None = None):
    """The hidden states after this layer: of all columns, or of those that are wanted."""
    asking = _at(wanted, x)
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

  def __call__(self, x, attend: Attend, wanted: Columns | None = None):
    """The hidden states after this layer: of all columns, or of those that are wanted."""
    query, key, value = jnp.moveaxis(self.attn_qkv(x if self.attn_norm is None else self.attn_norm(x)), 2, 0)
    x = _at(wanted, x) + self.attn_out(attend(_at(wanted, query), key, value))
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
    self, texts: Texts, *, first_only: bool = False, mesh: Mesh | None = None, dtype=jnp.float32, remat: bool = False
  ) -> Float[Array, "rows columns embed"] | Float[Array, "rows texts embed"]:
    """Hidden states of all columns or, if only these are wanted, of each text's first; no text sees another one.

    Of other columns, the last layer then computes keys and values only.
    """
    x = self.embeddings(texts, dtype)
    attends, wanted = self._attends(texts, first_only, on_one_cpu(mesh)), [None] * len(self.layers)
    if first_only:
      wanted[-1] = texts.first
    for layer, attend, some in zip(self.layers, attends, wanted, strict=True):
      x = _rematerialised(layer, x, attend, some) if remat else layer(x, attend, some)
    return x if self.final_norm is None else self.final_norm(x)

  def _attends(self, texts: Texts, first_only: bool, in_turn: bool) -> list[Attend]:
    length = texts.position.shape[1]
    turns = [rotation(rope, self.config.head_dim, texts.position, length) for rope in self.config.ropes]
    turns = [(turn, turn) for turn in turns]
    kinds = {window: _visible(texts, window) for window in dict.fromkeys(self.config.windows)}
    layers = [
      (kinds[window], None if rope is None else turns[rope])
      for window, rope in zip(self.config.windows, self.config.layer_ropes, strict=True)
    ]
    if first_only:
      visible, turn = layers[-1]
      visible = _at(texts.first, visible) if visible.shape[1] > 1 else visible
      layers[-1] = visible, turn and (Rotation(*(_at(texts.first, part) for part in turn[0])), turn[1])
    return [functools.partial(attention, visible=visible, turns=turn, in_turn=in_turn) for visible, turn in layers]


def _rematerialised(layer, x, attend: Attend, wanted: Columns | None):
  # A function of its own, because nnx.remat would trace `attend` if it were an argument.
  return nnx.remat(lambda layer, x: layer(x, attend, wanted))(layer, x)


def _at(columns: Columns | None, x: Shaped[Array, "rows columns *rest"]) -> Shaped[Array, "rows wanted *rest"]:
  """What stands in these columns of each row; all of it where none are named."""
  if columns is None:
    return x
  return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)


def attention(
  query: Float[Array, "rows wanted heads head_dim"],
  key: Float[Array, "rows length heads head_dim"],
  value: Float[Array, "rows length heads head_dim"],
  *,
  visible: Bool[Array, " rows #wanted length"],
  turns: tuple[Rotation, Rotation] | None = None,
  in_turn: bool = False,
) -> Float[Array, "rows wanted heads head_dim"]:
  """Softmax attention of queries over the keys that each may see; `turns` rotate queries and keys by position.

  `in_turn` computes a few rows after the other, whose logits stay in a CPU's caches.
  """
  rows, wanted, heads, _ = query.shape
  if turns is not None:
    query, key = rotate(query, turns[0]), rotate(key, turns[1])
  at_once = max(1, CACHED // (heads * wanted * key.shape[1])) if in_turn else rows
  out, met = [], None
  for start in range(0, rows, at_once):
    some = slice(start, start + at_once)
    asking = query[some] if met is None else after(met.total, query[some])
    met = meet(heads_first(asking), *lay_out(key[some], value[some]), visible[some], scale=query.shape[-1] ** -0.5)
    out.append(jnp.swapaxes(met.normalised(), 1, 2).astype(query.dtype))
  return jnp.concatenate(out)


def _visible(texts: Texts, window: int | None) -> Bool[Array, " rows #columns columns"]:
  """Which columns each one sees: those of its own text, at most `window` to either side."""
  text = texts.text
  seen = (text > 0)[:, None, :]
  if texts.first.shape[1] > 1:
    seen = seen & (text[:, :, None] == text[:, None, :])
  if window is None:
    return seen
  column = jnp.arange(text.shape[1])
  return seen & (jnp.abs(column[:, None] - column) <= window)

"""One decoder for Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3, driven by its configuration.

Module and attribute names are those of the Hugging Face checkpoints, so that a parameter's path is its name there.
"""

import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.layers import Embedding, Linear, RMSNorm, Rotation, activate, rotate, rotation
from tsalign_jax.ops.masking import Masking

Layout = Literal["stacked", "unrolled"]


class Attend(Protocol):
  """How queries meet keys: over a `Branches` or `Packed` batch, or against a cache that one decoding step extends."""

  positions: int  # no token's position reaches it

  def __call__(self, query, key, value, *, masking: Masking, layer, cache):
    """The output, shaped like query [batch, tokens, heads, head_dim], and the cache with what this layer adds."""
    ...


class Attention(nnx.Module):
  """Projections, head norms and rotation; `attend` does the rest."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
    embed = {"embed": config.embed}
    self.q_proj = Linear(embed, heads, rngs, bias=config.qkv_bias)
    self.k_proj = Linear(embed, kv_heads, rngs, bias=config.qkv_bias)
    self.v_proj = Linear(embed, kv_heads, rngs, bias=config.qkv_bias)
    self.o_proj = Linear(heads, embed, rngs, bias=config.out_bias)
    norm = functools.partial(RMSNorm, {"head_dim": config.head_dim}, config.norm_eps, offset=float(config.gemma))
    self.q_norm = norm() if config.qk_norm else None
    self.k_norm = norm() if config.qk_norm else None

  def __call__(self, x, turn: Rotation, attend):
    """The attention block's contribution to x, and the cache that `attend` returns."""
    query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    if self.q_norm is not None:
      query, key = self.q_norm(query), self.k_norm(key)
    out, cache = attend(rotate(query, turn), rotate(key, turn), value)
    return self.o_proj(out), cache


class MLP(nnx.Module):
  """Gated feed-forward block."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    embed, mlp = {"embed": config.embed}, {"mlp": config.mlp}
    self.gate_proj = Linear(embed, mlp, rngs, bias=config.mlp_bias)
    self.up_proj = Linear(embed, mlp, rngs, bias=config.mlp_bias)
    self.down_proj = Linear(mlp, embed, rngs, bias=config.mlp_bias)
    self.activation = config.activation

  def __call__(self, x):
    """down(act(gate(x)) * up(x))."""
    return self.down_proj(activate(self.activation, self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nnx.Module):
  """Attention and feed-forward, each behind a norm; Gemma norms what they return as well."""

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
    norm = functools.partial(RMSNorm, {"embed": config.embed}, config.norm_eps, offset=float(config.gemma))
    self.input_layernorm = norm()
    self.self_attn = Attention(config, rngs)
    self.post_attention_layernorm = norm()
    self.pre_feedforward_layernorm = norm() if config.gemma else None
    self.post_feedforward_layernorm = norm() if config.gemma else None
    self.mlp = MLP(config, rngs)

  def __call__(self, x, turn: Rotation, attend):
    """The hidden states after this layer, and the cache that `attend` returns."""
    out, cache = self.self_attn(self.input_layernorm(x), turn, attend)
    if self.pre_feedforward_layernorm is None:
      x = x + out
      return x + self.mlp(self.post_attention_layernorm(x)), cache
    x = x + self.post_attention_layernorm(out)
    return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache


class Decoder(nnx.Module):
  """Embeddings, layers and the final norm. Heads are apart: see `LanguageModel` and `DecoderRewardModel`.

  `layout` says how the layers lie: "stacked", with one leading layer axis, run by a scan (fast to compile, and
  what TPUs want), or "unrolled", one module each (what CPUs want).
  """

  def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, layout: Layout = "unrolled"):
    self.config = config
    self.embed_tokens = Embedding({"vocab": config.vocab}, config.embed, rngs)
    if layout == "stacked":
      make = nnx.vmap(lambda keys: DecoderLayer(config, keys), in_axes=0)
      self.layers = make(rngs.split(config.layers))
    else:
      self.layers = nnx.List([DecoderLayer(config, rngs) for _ in range(config.layers)])
    self.norm = RMSNorm({"embed": config.embed}, config.norm_eps, offset=float(config.gemma))

  def __call__(
    self,
    tokens: Int[Array, "batch tokens"],
    position: Int[Array, "batch tokens"],
    attend: Attend,
    *,
    cache=None,
    dtype=jnp.float32,
    remat: bool = False,
  ) -> tuple[Float[Array, "batch tokens embed"], object]:
    """Hidden states after the final norm, and the cache as `attend` left it."""
    x = self.embed_tokens(tokens, dtype)
    if self.config.gemma:
      x = x * jnp.asarray(self.config.embed**0.5, dtype)
    turns = [rotation(rope, self.config.head_dim, position, attend.positions) for rope in self.config.ropes]
    run = self._run_unrolled if isinstance(self.layers, nnx.List) else self._run_stacked
    x, cache = run(x, turns, attend, cache, remat)
    return self.norm(x), cache

  def _masking(self, windows: tuple[int | None, ...], kind=0) -> Masking:
    return Masking(self.config.attention_scale, self.config.attention_softcap, windows, kind)

  def _run_unrolled(self, x, turns, attend, cache, remat):
    for index, layer in enumerate(self.layers):
      step = self._step(index, attend)
      x, cache = (nnx.remat(step) if remat else step)(layer, x, turns[self.config.layer_ropes[index]], cache)
    return x, cache

  def _step(self, index: int, attend):
    # A closure, because remat traces every argument: a window that is static has to stay so.
    masking = self._masking(self.config.windows[index : index + 1])

    def step(layer, x, turn, cache):
      return layer(x, turn, functools.partial(attend, masking=masking, layer=index, cache=cache))

    return step

  def _run_stacked(self, x, turns, attend, cache, remat):
    skeleton, weights = nnx.split(self.layers)
    turns = jax.tree.map(lambda *parts: jnp.stack(parts), *turns)
    windows = tuple(dict.fromkeys(self.config.windows))
    per_layer = (
      weights,
      jnp.arange(self.config.layers),
      jnp.asarray(self.config.layer_ropes),
      jnp.asarray([windows.index(window) for window in self.config.windows]),
    )

    def step(carry, inputs):
      x, cache = carry
      weights, index, rope, kind = inputs
      turn = Rotation(*(part[rope] for part in turns))
      masking = self._masking(windows, kind if len(windows) > 1 else 0)
      layer = nnx.merge(skeleton, weights)
      return layer(x, turn, functools.partial(attend, masking=masking, layer=index, cache=cache)), None

    (x, cache), _ = jax.lax.scan(jax.checkpoint(step) if remat else step, (x, cache), per_layer)
    return x, cache

"""What a Hugging Face `config.json` says about a model, for the decoder and the encoder families we know."""

import dataclasses
import json
from pathlib import Path

from transformers import AutoConfig

from tsalign_jax.types import UserError

DECODERS = {
  "LlamaForCausalLM": "llama",
  "MistralForCausalLM": "mistral",
  "Qwen2ForCausalLM": "qwen2",
  "Qwen3ForCausalLM": "qwen3",
  "Gemma2ForCausalLM": "gemma2",
  "Gemma3ForCausalLM": "gemma3",
  "LlamaForSequenceClassification": "llama",
  "MistralForSequenceClassification": "mistral",
  "Qwen2ForSequenceClassification": "qwen2",
  "Qwen3ForSequenceClassification": "qwen3",
  "Gemma2ForSequenceClassification": "gemma2",
  "Gemma3TextForSequenceClassification": "gemma3",
}
ENCODERS = {
  "BertModel": "bert",
  "BertForMaskedLM": "bert",
  "BertForSequenceClassification": "bert",
  "RobertaModel": "roberta",
  "RobertaForMaskedLM": "roberta",
  "RobertaForSequenceClassification": "roberta",
  "ModernBertModel": "modernbert",
  "ModernBertForMaskedLM": "modernbert",
  "ModernBertForSequenceClassification": "modernbert",
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding of a layer: base, and how positions are stretched (Llama 3's, or linear)."""

  theta: float
  kind: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only transformer; one field for each way in which the known families differ."""

  family: str
  vocab: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  max_positions: int
  norm_eps: float
  activation: str
  ropes: tuple[Rope, ...]
  layer_ropes: tuple[int, ...]  # index into ropes, one a layer
  windows: tuple[int | None, ...]  # sliding window in tokens, one a layer
  attention_scale: float
  tied: bool
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  gemma: bool = False  # norms scale by 1 + w, sandwich norms, embeddings times sqrt(embed)
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  reward_head: bool = False

  @property
  def max_tokens(self) -> int:
    """The longest sequence it was made for."""
    return self.max_positions


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """A bidirectional transformer: BERT, RoBERTa (absolute positions) or ModernBERT (rotary, local layers)."""

  family: str
  vocab: int
  embed: int
  layers: int
  heads: int
  mlp: int
  max_positions: int
  norm_eps: float
  activation: str
  layer_ropes: tuple[int | None, ...]  # index into ropes, one a layer; None where positions are absolute
  windows: tuple[int | None, ...]  # tokens to either side, one a layer
  first_position: int = 0  # RoBERTa counts from pad + 1
  type_vocab: int = 0
  norm_bias: bool = True
  attention_bias: bool = True
  mlp_bias: bool = True
  ropes: tuple[Rope, ...] = ()
  classifier_activation: str = "tanh"
  classifier_bias: bool = True
  pooling: str = "cls"
  reward_head: bool = False

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.embed // self.heads

  @property
  def max_tokens(self) -> int:
    """How many tokens the longest sequence has for which there are positions."""
    return self.max_positions - self.first_position


ModelConfig = DecoderConfig | EncoderConfig


def read_config(folder: Path) -> ModelConfig:
  """The configuration of a Hugging Face folder.

  Raises UserError when the folder or its `config.json` is missing, when the architecture is not one we know
  (the message lists those), or when a reward model has more than one label.
  """
  if not (Path(folder) / "config.json").is_file():
    raise UserError(f"{folder}: no config.json there; a model is a Hugging Face folder (see `tsalign import-gguf`)")
  architecture = (json.loads((Path(folder) / "config.json").read_text()).get("architectures") or ["(none)"])[0]
  if architecture not in DECODERS and architecture not in ENCODERS:
    known = ", ".join(sorted(DECODERS | ENCODERS))
    raise UserError(f"{folder}: architecture {architecture} is not supported; known are {known}")
  source = AutoConfig.from_pretrained(folder)
  if getattr(source, "quantization_config", None):
    raise UserError(f"{folder}: its weights are quantised; use the folder with the original weights")
  reward = architecture.endswith("ForSequenceClassification")
  if reward and source.num_labels != 1:
    raise UserError(f"{folder}: a reward model has one label, this {architecture} has {source.num_labels}")
  if architecture in DECODERS:
    return _decoder(source, DECODERS[architecture], reward)
  return _encoder(source, ENCODERS[architecture], reward)


def _decoder(source, family: str, reward: bool) -> DecoderConfig:
  gemma = family in ("gemma2", "gemma3")
  ropes, layer_ropes = _ropes(source)
  head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
  bias = bool(getattr(source, "attention_bias", False))
  return DecoderConfig(
    family=family,
    vocab=source.vocab_size,
    embed=source.hidden_size,
    layers=source.num_hidden_layers,
    heads=source.num_attention_heads,
    kv_heads=source.num_key_value_heads,
    head_dim=head_dim,
    mlp=source.intermediate_size,
    max_positions=source.max_position_embeddings,
    norm_eps=source.rms_norm_eps,
    activation=source.hidden_activation if gemma else source.hidden_act,
    ropes=ropes,
    layer_ropes=layer_ropes,
    windows=_windows(source),
    attention_scale=(source.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
    tied=bool(source.tie_word_embeddings),
    qkv_bias=family == "qwen2" or bias,
    out_bias=bias,
    mlp_bias=bool(getattr(source, "mlp_bias", False)),
    qk_norm=family in ("qwen3", "gemma3"),
    gemma=gemma,
    attention_softcap=source.attn_logit_softcapping if gemma else None,
    logit_softcap=source.final_logit_softcapping if gemma else None,
    reward_head=reward,
  )


def _encoder(source, family: str, reward: bool) -> EncoderConfig:
  modern = family == "modernbert"
  shared = {
    "family": family,
    "vocab": source.vocab_size,
    "embed": source.hidden_size,
    "layers": source.num_hidden_layers,
    "heads": source.num_attention_heads,
    "mlp": source.intermediate_size,
    "max_positions": source.max_position_embeddings,
    "norm_eps": source.norm_eps if modern else source.layer_norm_eps,
    "activation": source.hidden_activation if modern else source.hidden_act,
    "reward_head": reward,
  }
  if not modern:
    nowhere = (None,) * source.num_hidden_layers
    first = source.pad_token_id + 1 if family == "roberta" else 0
    absolute = {"layer_ropes": nowhere, "windows": nowhere, "first_position": first}
    return EncoderConfig(**shared, **absolute, type_vocab=source.type_vocab_size)
  ropes, layer_ropes = _ropes(source)
  half = source.local_attention // 2
  return EncoderConfig(
    **shared,
    norm_bias=source.norm_bias,
    attention_bias=source.attention_bias,
    mlp_bias=source.mlp_bias,
    ropes=ropes,
    layer_ropes=layer_ropes,
    windows=tuple(half if kind == "sliding_attention" else None for kind in source.layer_types),
    classifier_activation=source.classifier_activation,
    classifier_bias=source.classifier_bias,
    pooling=source.classifier_pooling,
  )


def _windows(source) -> tuple[int | None, ...]:
  window = getattr(source, "sliding_window", None)
  kinds = getattr(source, "layer_types", None)
  if kinds is None:  # Mistral: every layer or none
    return (window,) * source.num_hidden_layers
  return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _ropes(source) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
  parameters = source.rope_parameters
  if "rope_theta" in parameters:
    return (_rope(parameters),), (0,) * source.num_hidden_layers
  kinds = sorted(parameters)  # one set of parameters for each kind of layer
  return tuple(_rope(parameters[kind]) for kind in kinds), tuple(kinds.index(kind) for kind in source.layer_types)


def _rope(parameters: dict) -> Rope:
  kind = parameters.get("rope_type", "default")
  if kind not in ("default", "linear", "llama3"):
    raise UserError(f"config.json: rope_type {kind} is not supported; known are default, linear, llama3")
  return Rope(
    theta=parameters["rope_theta"],
    kind=kind,
    factor=parameters.get("factor", 1.0),
    low_freq_factor=parameters.get("low_freq_factor", 1.0),
    high_freq_factor=parameters.get("high_freq_factor", 4.0),
    original_positions=parameters.get("original_max_position_embeddings", 8192),
  )

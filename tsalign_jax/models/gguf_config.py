"""What a GGUF file of the Llama family says about its model, as a Hugging Face configuration."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from tsalign_jax.models.gguf_tokenizer import special_ids
from tsalign_jax.types import UserError

ARCHITECTURES = ("llama", "qwen2")
ROPE_FREQS = "rope_freqs.weight"
# Settings that change what the model computes and that its Hugging Face class has no field for.
_UNKNOWN_SETTINGS = ("expert_count", "attention.scale", "attention.temperature_scale", "logit_scale")


class GgufFile:
  """An open GGUF file: metadata by key, and tensors by name, which stay on disk until they are read.

  Raises UserError for a damaged file and for an architecture that we do not know.
  """

  def __init__(self, path: Path):
    reader = _open(path)
    self.path = path
    self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
    self.architecture = self.metadata.get("general.architecture")
    if self.architecture not in ARCHITECTURES:
      known = ", ".join(ARCHITECTURES)
      raise UserError(f"{path}: GGUF architecture {self.architecture} is not supported; known are {known}")

  def get(self, key: str, default=None):
    """A setting of this architecture, such as "rope.freq_base"."""
    value = self.metadata.get(f"{self.architecture}.{key}", default)
    # Stored in float32: what reads as 9.999999747378752e-06 was 1e-05.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  def need(self, key: str) -> int | float:
    """A setting that every file has, one number for all layers."""
    value = self.get(key)
    if not isinstance(value, int | float):
      raise UserError(f"{self.path}: {self.architecture}.{key} must be one number, it is {value}")
    return value

  def tensor(self, name: str) -> ReaderTensor:
    """A tensor that the model needs."""
    if name not in self.tensors:
      raise UserError(f"{self.path}: tensor {name} is missing; a file that was split must be merged first")
    return self.tensors[name]


def read_gguf_config(file: GgufFile, dtype: str) -> PreTrainedConfig:
  """The configuration of the model, whose `architectures` names its class.

  Raises UserError for what these classes cannot express: experts, and heads or rope of another form.
  """
  for key in _UNKNOWN_SETTINGS:
    if file.get(key):
      raise UserError(f"{file.path}: {file.architecture}.{key} = {file.get(key)} is not supported")
  heads, embed = file.need("attention.head_count"), file.need("embedding_length")
  head_dim = _head_dim(file, embed // heads)
  ids = special_ids(file.metadata)
  shared = {
    "vocab_size": len(file.tensor("token_embd.weight").data),
    "hidden_size": embed,
    "intermediate_size": file.need("feed_forward_length"),
    "num_hidden_layers": file.need("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": file.get("attention.head_count_kv", heads),
    "max_position_embeddings": file.need("context_length"),
    "rms_norm_eps": file.need("attention.layer_norm_rms_epsilon"),
    "rope_parameters": _rope(file, head_dim),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "dtype": dtype,
    **{f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
  }
  if file.architecture == "qwen2":
    return Qwen2Config(architectures=["Qwen2ForCausalLM"], **shared)
  window = file.get("attention.sliding_window")
  if window:  # Mistral comes as llama, and without a window the two are the same model
    shared |= {"sliding_window": window, "head_dim": head_dim}
    return MistralConfig(architectures=["MistralForCausalLM"], **shared)
  biases = {
    "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
  }
  return LlamaConfig(architectures=["LlamaForCausalLM"], **shared, **biases, head_dim=head_dim)


def _open(path: Path) -> GGUFReader:
  try:
    reader = GGUFReader(path)
  except (ValueError, IndexError, KeyError) as error:
    raise UserError(f"{path}: is damaged, cut short or of an unknown GGUF version ({error})") from error
  if reader.byte_order != "I":
    raise UserError(f"{path}: its byte order is not that of this machine; get a little-endian GGUF file")
  return reader


def _head_dim(file: GgufFile, even: int) -> int:
  """The width of a head: `even`, the embedding split evenly, unless the file gives one."""
  head_dim = file.get("attention.key_length", even)
  others = {file.get("attention.value_length", head_dim), file.get("rope.dimension_count", head_dim)}
  if others != {head_dim} or (file.architecture == "qwen2" and head_dim != even):
    raise UserError(f"{file.path}: heads of unequal or only partly rotated width are not supported")
  return head_dim


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
  theta = file.get("rope.freq_base", 10000.0)
  kind = file.get("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
  factor = file.get("rope.scaling.factor", file.get("rope.scale_linear", 1.0))
  linear = kind == "linear" and factor not in (0.0, 1.0)
  if kind not in ("none", "linear") or (linear and ROPE_FREQS in file.tensors):
    raise UserError(f"{file.path}: rope scaling {kind} is not supported; known are linear and Llama 3's")
  if ROPE_FREQS in file.tensors:
    return {"rope_theta": theta, **_llama3_scaling(file, theta, head_dim)}
  if linear:
    return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
  return {"rope_theta": theta, "rope_type": "default"}


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
  """Llama 3's scaling: a file has only what each frequency is divided by, the family shares the rest."""
  divisors = np.array(file.tensors[ROPE_FREQS].data, np.float64)
  factor = float(divisors.max())
  low, high, original = 1.0, 4.0, 8192
  turns = original / (2 * np.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  expected = 1 / ((1 - smooth) / factor + smooth)
  if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
    raise UserError(f"{file.path}: {ROPE_FREQS} is not the rope scaling of Llama 3, the only one known here")
  return {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": low,
    "high_freq_factor": high,
    "original_max_position_embeddings": original,
  }

"""Tiny models as GGUF files, written the way llama.cpp's converter writes them."""

import math
import pathlib

import gguf
import gguf_vocabulary
import numpy as np
import torch
import transformers as hf

SIZES = {
  "vocab_size": 300,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
  "bos_token_id": 1,
  "eos_token_id": 0,
  "pad_token_id": 3,
  "rms_norm_eps": 1e-5,
  "dtype": "float32",
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500000.0,
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
  "llama": (hf.LlamaForCausalLM, {}),
  "llama_biased": (hf.LlamaForCausalLM, {**BIASES, "rope_parameters": LINEAR}),
  "llama3": (hf.LlamaForCausalLM, {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
  "mistral": (hf.MistralForCausalLM, {"sliding_window": 4}),
  "qwen2": (hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
}
PARTS = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
}


def model(family: str):
  """A tiny random model of this family, in float32."""
  torch.manual_seed(0)
  model_class, extra = MODELS[family]
  made = model_class(model_class.config_class(**(SIZES | extra), attn_implementation="eager"))
  with torch.no_grad():
    for parameter in made.parameters():
      parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
  return made.eval()


def write(path: pathlib.Path, source, *, kind: str = "F32", extra: dict | None = None, tensors=None):
  """Writes a model as GGUF, its matrices quantised; `extra` replaces settings, `tensors` replaces tensors."""
  arch = "qwen2" if source.config.model_type == "qwen2" else "llama"
  settings = _settings(source.config, arch) | gguf_vocabulary.byte_level() | (extra or {})
  writer = gguf.GGUFWriter(path, settings.pop("general.architecture", arch))
  for key, value in settings.items():
    _add(writer, key, value)
  arrays = dict(_tensors(source, permute=arch == "llama")) | (tensors or {})
  for name, array in arrays.items():
    quantised = kind if array.ndim == 2 else "F32"
    if array.dtype == np.float64:
      writer.add_tensor(name, array)
      continue
    number = gguf.GGMLQuantizationType[quantised]
    writer.add_tensor(name, gguf.quantize(array, number), raw_dtype=number)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _settings(config, arch: str) -> dict:
  rope = config.rope_parameters
  settings = {
    "block_count": config.num_hidden_layers,
    "context_length": config.max_position_embeddings,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_attention_heads,
    "attention.head_count_kv": config.num_key_value_heads,
    "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    "rope.freq_base": rope["rope_theta"],
  }
  head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
  if head_dim != config.hidden_size // config.num_attention_heads:
    settings |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
  if arch == "llama":
    settings |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
  if rope["rope_type"] == "linear":
    settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
  if config.model_type == "mistral":
    settings["attention.sliding_window"] = config.sliding_window
  return {f"{arch}.{key}": value for key, value in settings.items()}


def _add(writer, key: str, value) -> None:
  kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
  kinds.get(type(value), writer.add_array)(key, value)


def _tensors(source, permute: bool):
  config = source.config
  top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
  for name, value in source.state_dict().items():
    array = value.numpy()
    if name == "lm_head.weight":
      if not config.tie_word_embeddings:
        yield "output.weight", array
    elif name in top:
      yield top[name], array
    else:
      _, _, layer, *module, kind = name.split(".")
      part = PARTS[".".join(module)]
      heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
      yield f"blk.{layer}.{part}.{kind}", interleave(array, heads) if permute and heads else array
  if config.rope_parameters["rope_type"] == "llama3":
    yield "rope_freqs.weight", _llama3_divisors(config)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's order of a head's rows: first of the one half, first of the other, second of the one, ..."""
  result, dim = np.empty_like(rows), len(rows) // heads
  for head in range(heads):
    for pair in range(dim // 2):
      result[head * dim + 2 * pair] = rows[head * dim + pair]
      result[head * dim + 2 * pair + 1] = rows[head * dim + dim // 2 + pair]
  return result


def _llama3_divisors(config) -> np.ndarray:
  rope, divisors = config.rope_parameters, []
  for index in range(0, config.head_dim, 2):
    wavelength = 2 * math.pi * rope["rope_theta"] ** (index / config.head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    if turns > rope["high_freq_factor"]:
      divisors.append(1.0)
    elif turns < rope["low_freq_factor"]:
      divisors.append(rope["factor"])
    else:
      smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
      divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
  return np.array(divisors, np.float32)

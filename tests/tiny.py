"""Tiny random Hugging Face checkpoints, one for each family: what differential tests compare against."""

import pathlib

import torch
import transformers as hf

SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
PATTERN = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
DECODERS = {
  "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
  "llama3": (hf.LlamaConfig, hf.LlamaForCausalLM, {"rope_parameters": LLAMA3, "attention_bias": True}),
  "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 6, **HEAD}),
  "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
  "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, HEAD),
  "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, {**HEAD, **PATTERN, "query_pre_attn_scalar": 24}),
  "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {**HEAD, **PATTERN, "query_pre_attn_scalar": 24}),
}
REWARD = {
  "llama": hf.LlamaForSequenceClassification,
  "llama3": hf.LlamaForSequenceClassification,
  "mistral": hf.MistralForSequenceClassification,
  "qwen2": hf.Qwen2ForSequenceClassification,
  "qwen3": hf.Qwen3ForSequenceClassification,
  "gemma2": hf.Gemma2ForSequenceClassification,
  "gemma3": hf.Gemma3TextForSequenceClassification,
}
ENCODER_SIZES = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
BERT = (hf.BertConfig, hf.BertModel, hf.BertForSequenceClassification)
ROBERTA = (hf.RobertaConfig, hf.RobertaModel, hf.RobertaForSequenceClassification)
MODERN_BERT = (hf.ModernBertConfig, hf.ModernBertModel, hf.ModernBertForSequenceClassification)
LOCAL = {
  "local_attention": 8,
  "layer_types": ["full_attention", "sliding_attention"] * 2,
  "cls_token_id": 1,
  "sep_token_id": 2,
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
ENCODERS = {
  "bert": (*BERT, {}),
  "roberta": (*ROBERTA, {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}),
  "modernbert": (*MODERN_BERT, LOCAL),
  "modernbert_mean": (*MODERN_BERT, {**LOCAL, **BIASES, "classifier_pooling": "mean"}),
}


def decoder(family: str, folder: pathlib.Path, *, reward: bool = False, seed: int = 0):
  """Saves a tiny random decoder of this family and returns the PyTorch model, in float32 and eval mode."""
  config_class, model_class, extra = DECODERS[family]
  config = config_class(**(SIZES | extra), **({"num_labels": 1} if reward else {}), attn_implementation="eager")
  return _save((REWARD[family] if reward else model_class)(config), folder, seed)


def encoder(family: str, folder: pathlib.Path, *, reward: bool = False, seed: int = 0):
  """Saves a tiny random encoder of this family, bare or with a reward head, and returns the PyTorch model."""
  config_class, bare_class, reward_class, extra = ENCODERS[family]
  labels = {"num_labels": 1} if reward else {}
  config = config_class(**(ENCODER_SIZES | extra), **labels, attn_implementation="eager")
  return _save((reward_class if reward else bare_class)(config), folder, seed)


def _save(model, folder: pathlib.Path, seed: int):
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in sorted(model.named_parameters()):
      center = 1.0 if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
      parameter.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))
  model.eval().save_pretrained(folder)
  return model

"""Tiny random Hugging Face checkpoints, one for each family: what differential tests compare against."""

import json
import pathlib
from collections.abc import Sequence

import tokenizers
import torch
import transformers as hf
import yaml

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


WORDS = (  # noqa: SIM905  a hundred quotes would not read better
  "the a an of to and in is it on for with as at by from or but not be are was cat dog sun sea tree bird fish rain "
  "snow wind fire stone road house door book song light dark red blue green warm cold big small old new one two three "
  "say tell write list name give make take see go come run eat drink sleep ? . , ! - 1 2 3 4"
).split()
TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer(folder: pathlib.Path, *, template: str | None = TEMPLATE, words: Sequence[str] = WORDS) -> None:
  """Saves a tokenizer of whole words, with a chat template, that fits the tiny decoders' vocabulary."""
  special = ["<pad>", "<s>", "<end>", "<unk>", "<user>", "<assistant>", "<system>"]
  vocabulary = {word: index for index, word in enumerate([*special, *words])}
  assert len(vocabulary) <= SIZES["vocab_size"]
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  core.normalizer = tokenizers.normalizers.Replace("<s>", "<s> ")
  wrapped = hf.PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token="<s>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
  )
  wrapped.add_special_tokens({"additional_special_tokens": special[4:]})
  wrapped.chat_template = template
  wrapped.save_pretrained(folder)


def bert_tokenizer(folder: pathlib.Path, *, pad: int = 0) -> None:
  """Saves a BERT tokenizer over the same words, whose padding token is 0, or 1 as RoBERTa has it."""
  special = ["[PAD]", "[UNK]"] if pad == 0 else ["[UNK]", "[PAD]"]
  vocabulary = {word: index for index, word in enumerate([*special, "[CLS]", "[SEP]", "[MASK]", *WORDS])}
  hf.BertTokenizer(vocab=vocabulary).save_pretrained(folder)


def change_json(file: pathlib.Path, **changes) -> None:
  """Overwrites top-level keys of a JSON file, such as a model's config.json."""
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def prompts(file: pathlib.Path, count: int, offset: int = 0) -> None:
  """Writes prompts with checks that random words satisfy now and then."""
  rows = []
  for index in range(offset, offset + count):
    first, second = WORDS[index % 40], WORDS[(7 * index + 3) % 60]
    rows.append(
      {
        "prompt": f"write of {first} with {second} in {1 + index % 4}",
        "checks": [
          {"name": "max_words", "limit": 4 + index % 5},
          {"name": "include_words", "words": [second]},
          {"name": "exclude_words", "words": [first]},
        ],
      }
    )
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_config(folder: pathlib.Path, **changes) -> pathlib.Path:
  """A whole tiny run: models, prompts and a configuration file, whose path is returned."""
  policy, student = folder / "policy", folder / "student"
  decoder("llama", policy)
  tokenizer(policy)
  encoder("bert", student, reward=True)
  bert_tokenizer(student)
  prompts(folder / "train.jsonl", 24)
  prompts(folder / "heldout.jsonl", 8, offset=100)
  config = {
    "run": str(folder / "run"),
    "rounds": 2,
    "policy": {"path": str(policy), "dtype": "float32"},
    "student": {"path": str(student), "dtype": "float32", "warm_start": {"prompts": 8, "pairs": 2}},
    "prompts": {
      "train": str(folder / "train.jsonl"),
      "heldout": str(folder / "heldout.jsonl"),
      "per_round": 8,
      "max_tokens": 60,
    },
    "sampling": {"responses": 4, "max_new_tokens": 12, "batch_prompts": 4},
    "align": {"learning_rate": 1e-3, "batch_size": 4, "microbatch_tokens": 256, "epochs": 4, "checkpoint_every": 2},
    "distil": {"learning_rate": 1e-3, "batch_size": 4, "microbatch_tokens": 512, "epochs": 2, "checkpoint_every": 2},
    "evaluation": {"resamples": 200},
  }
  file = folder / "config.yaml"
  file.write_text(yaml.safe_dump(config | changes))
  return file

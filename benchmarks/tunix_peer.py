"""google-tunix: its sampler, and its DPO trainer, over its own Llama."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate import sampler as tunix_sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft.dpo import dpo_trainer

PAD = 0  # occurs in no text


class Sampling:
  """Useful tokens: every response is a row of its own, with its own copy of the prompt."""

  packages = ("google-tunix", "jax")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.work, self.batch = work, settings["batch"]
    model = _load(work["policy"], jnp.bfloat16)
    self.width = _round_up(max(map(len, work["prompts"])))
    cache = tunix_sampler.CacheConfig(
      cache_size=self.width + work["max_new_tokens"],
      num_layers=model.config.num_layers,
      num_kv_heads=model.config.num_kv_heads,
      head_dim=model.config.head_dim,
    )
    self.sampler = tunix_sampler.Sampler(model, _Tokens(), cache)
    self.run(0)

  def run(self, seed: int) -> dict[str, float]:
    """Samples every response once."""
    ordered, lengths = sorted(self.work["prompts"], key=len, reverse=True), []
    for start in range(0, len(ordered), self.batch):
      prompts = ordered[start : start + self.batch]
      out = self.sampler(
        [json.dumps(prompt) for prompt in prompts for _ in range(self.work["responses"])],
        max_generation_steps=self.work["max_new_tokens"],
        max_prompt_length=self.width,
        eos_tokens=self.work["stop"] or [-1],
        temperature=1.0,
        top_p=1.0,
        seed=1000 * seed + start,
      )
      lengths += [self._useful(tokens) for tokens in out.tokens]
    return {"units": sum(lengths), "responses": len(lengths), "tokens_a_response": float(np.mean(lengths))}

  def _useful(self, tokens: Sequence[int]) -> int:
    """The length with the end token, which this sampler leaves out."""
    return min(len(tokens) + bool(self.work["stop"]), self.work["max_new_tokens"])


class Dpo:
  """Pairs. It trains the weights in the dtype that it computes in, and asks the reference anew in every step."""

  packages = ("google-tunix", "jax")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.work, self.batch = work, min(settings["batch"], work["batch_size"])
    self.prompt = _round_up(max(len(row["prompt_tokens"]) for row in work["pairs"]))
    sides = [row[f"{side}_tokens"] for row in work["pairs"] for side in ("chosen", "rejected")]
    self.response = _round_up(max(map(len, sides)))
    training = dpo_trainer.DPOTrainingConfig(
      eval_every_n_steps=10**9,
      gradient_accumulation_steps=work["batch_size"] // self.batch,
      beta=work["beta"],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(work["learning_rate"], weight_decay=0.0))
    model, reference = (_load(work["policy"], jnp.bfloat16) for _ in range(2))
    self.trainer = dpo_trainer.DPOTrainer(model, reference, optimizer, training)
    self.trainer.is_managed_externally = True  # else a second pass would skip what the first has seen
    tokens = sum(2 * len(row["prompt_tokens"]) for row in work["pairs"]) + sum(map(len, sides))
    self.check = {"tokens": tokens}
    for _ in range(2):  # the second pass compiles again
      self.run(0)

  def run(self, seed: int) -> dict[str, float]:
    """One pass over the pairs."""
    self.trainer.train(self._batches())
    jax.block_until_ready(jax.tree.leaves(self.trainer.model))
    return {"units": len(self.work["pairs"])}

  def _batches(self) -> Iterator[dpo_trainer.TrainingInput]:
    for start in range(0, len(self.work["pairs"]), self.batch):
      rows = self.work["pairs"][start : start + self.batch]
      arrays = {}
      for side, width in (("prompt", self.prompt), ("chosen", self.response), ("rejected", self.response)):
        tokens = [row[f"{side}_tokens"] for row in rows]
        arrays[f"{side}_ids"], arrays[f"{side}_mask"] = _pad(tokens, width, left=side == "prompt")
      yield dpo_trainer.TrainingInput(**arrays)


class _Tokens:
  """A tokenizer for prompts that are tokens already, written as JSON."""

  def encode(self, text: str, **_) -> list[int]:
    return json.loads(text)

  def decode(self, ids: Sequence[int], **_) -> str:
    return ""

  def bos_id(self) -> int:
    return -1

  def eos_id(self) -> int:
    return -1

  def pad_id(self) -> int:
    return PAD


def _load(folder: str, dtype):
  source = json.loads((Path(folder) / "config.json").read_text())
  config = llama.ModelConfig(
    num_layers=source["num_hidden_layers"],
    vocab_size=source["vocab_size"],
    embed_dim=source["hidden_size"],
    hidden_dim=source["intermediate_size"],
    num_heads=source["num_attention_heads"],
    head_dim=source["head_dim"],
    num_kv_heads=source["num_key_value_heads"],
    rope_theta=source["rope_parameters"]["rope_theta"],
    norm_eps=source["rms_norm_eps"],
    weight_tying=source["tie_word_embeddings"],
  )
  return llama_params.create_model_from_safe_tensors(folder, config, dtype=dtype)


def _pad(rows: Sequence[Sequence[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and mask."""
  ids, mask = np.full((len(rows), width), PAD, np.int32), np.zeros((len(rows), width), np.int32)
  for index, row in enumerate(rows):
    place = slice(width - len(row), width) if left else slice(len(row))
    ids[index, place], mask[index, place] = row, 1
  return ids, mask


def _round_up(length: int) -> int:
  return -(-length // 16) * 16

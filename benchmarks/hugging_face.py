"""The peers of the PyTorch world: transformers for sampling and scoring, TRL for DPO and online DPO."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers as hf
from datasets import Dataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(len(os.sched_getaffinity(0)))


class RewardHead:
  """Saves a model with a random one-label head, and a padding token that no text contains."""

  packages = ("transformers", "torch")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(work["source"])
    model = hf.AutoModelForSequenceClassification.from_pretrained(work["source"], num_labels=1, dtype=torch.float32)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # the head is read at the last token that is not padding
      tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    unfinished = work["target"] + ".unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.rename(unfinished, work["target"])

  def run(self, seed: int) -> dict[str, float]:
    """Nothing to time."""
    return {}


class Sampling:
  """`generate` over batches of like length, or transformers' continuous batching over all prompts at once."""

  packages = ("transformers", "torch")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.work, self.settings = work, settings
    self.tokenizer = hf.AutoTokenizer.from_pretrained(work["policy"], padding_side="left")
    attention = settings.get("attention", "sdpa")
    self.model = hf.AutoModelForCausalLM.from_pretrained(
      work["policy"], dtype=torch.bfloat16, attn_implementation=attention
    )
    self.model = self.model.eval().to(DEVICE)
    self.model.generation_config.eos_token_id = None  # `generate` would put it where the work has no end token
    self.config = hf.GenerationConfig(
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=work["max_new_tokens"],
      num_return_sequences=work["responses"],
      eos_token_id=work["stop"] or None,
      pad_token_id=self.tokenizer.pad_token_id,
      cache_implementation=settings.get("cache"),  # a static one is compiled on GPUs
    )
    # A part warms a CPU up; what a GPU compiles depends on every batch's length.
    self._sample(work["prompts"] if DEVICE.type == "cuda" else work["prompts"][: settings.get("batch", 8)])

  def run(self, seed: int) -> dict[str, float]:
    """Samples every response once."""
    torch.manual_seed(seed)
    lengths = self._sample(self.work["prompts"])
    return {"units": sum(lengths), "responses": len(lengths), "tokens_a_response": float(np.mean(lengths))}

  def _sample(self, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The length of each response."""
    lengths = self._continuous(prompts) if self.settings.get("engine") == "continuous" else self._batches(prompts)
    if len(lengths) != len(prompts) * self.work["responses"]:
      raise RuntimeError(f"{len(lengths)} responses to {len(prompts)} prompts")
    return lengths

  @torch.inference_mode()
  def _batches(self, prompts: Sequence[Sequence[int]]) -> list[int]:
    ordered, lengths = sorted(prompts, key=len, reverse=True), []
    for start in range(0, len(ordered), self.settings["batch"]):
      batch = self.tokenizer.pad({"input_ids": ordered[start : start + self.settings["batch"]]}, return_tensors="pt")
      out = self.model.generate(**batch.to(DEVICE), generation_config=self.config)
      lengths += useful_lengths(out[:, batch["input_ids"].shape[1] :].cpu().numpy(), self.work["stop"])
    return lengths

  def _continuous(self, prompts: Sequence[Sequence[int]]) -> list[int]:
    # Not in inference mode: the engine works in a thread of its own, which would not be in it.
    page, sequences = 32, len(prompts) * self.work["responses"]
    pages = sequences * (2 + (max(map(len, prompts)) + self.work["max_new_tokens"]) // page)
    memory = {} if DEVICE.type == "cuda" else {"page_size": page, "num_blocks": pages, "max_batch_tokens": 512}
    config = self.config
    if not self.work["stop"]:
      config = hf.GenerationConfig(**config.to_diff_dict() | {"eos_token_id": -1})  # this engine takes no None
    out = self.model.generate_batch(
      [list(prompt) for prompt in prompts],
      generation_config=config,
      continuous_batching_config=hf.ContinuousBatchingConfig(**memory),
      progress_bar=False,
    )
    return [len(each.generated_tokens) for each in out.values()]


class Scoring:
  """Every prompt with every response as a sequence of its own, in padded batches of like length."""

  packages = ("transformers", "torch")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.work, self.settings = work, settings
    self.tokenizer = hf.AutoTokenizer.from_pretrained(work["model"], padding_side="right", truncation_side="left")
    self.model = hf.AutoModelForSequenceClassification.from_pretrained(
      work["model"], dtype=torch.bfloat16, attn_implementation=settings["attention"]
    )
    self.model = self.model.eval().to(DEVICE)
    rows = self._encode()
    self.check = {"tokens": sum(map(len, rows["input_ids"])), "scores": self._by_prompt(self._score(rows))}

  def run(self, seed: int) -> dict[str, float]:
    """Scores everything once, tokenising included."""
    return {"units": len(self._score(self._encode()))}

  def _encode(self):
    if self.work["kind"] == "encoder":
      both = [(item["plain"], text) for item in self.work["items"] for text in item["responses"]]
      prompts, responses = zip(*both, strict=True)
      limit = self.work["max_tokens"]
      return self.tokenizer(list(prompts), list(responses), truncation="only_first", max_length=limit)
    answered = [
      [*item["messages"], {"role": "assistant", "content": text}]
      for item in self.work["items"]
      for text in item["responses"]
    ]
    whole = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in answered]
    return self.tokenizer(whole, add_special_tokens=False)

  @torch.inference_mode()
  def _score(self, rows) -> np.ndarray:
    order = sorted(range(len(rows["input_ids"])), key=lambda index: len(rows["input_ids"][index]))
    scores = np.zeros(len(order), np.float32)
    for start in range(0, len(order), self.settings["batch"]):
      indices = order[start : start + self.settings["batch"]]
      batch = {key: [rows[key][index] for index in indices] for key in rows}
      batch = self.tokenizer.pad(batch, return_tensors="pt").to(DEVICE)
      scores[indices] = self.model(**batch).logits[:, 0].float().cpu().numpy()
    return scores

  def _by_prompt(self, scores: np.ndarray) -> list[list[float]]:
    return scores.reshape(len(self.work["items"]), -1).tolist()


class Dpo:
  """TRL's `DPOTrainer`: full fine-tuning with AdamW, the reference log-probabilities computed beforehand."""

  packages = ("trl", "transformers", "torch")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    import trl  # takes a while to import, and the other contenders do without it

    tokenizer = hf.AutoTokenizer.from_pretrained(work["policy"])
    model = hf.AutoModelForCausalLM.from_pretrained(
      work["policy"], dtype=settings.get("weights", "float32"), attn_implementation=settings.get("attention", "sdpa")
    )
    # As plain text TRL adds just the end token; as messages its template would add a line break, which nobody samples.
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in work["pairs"]]
    arguments = trl.DPOConfig(
      **_training(work, settings),
      beta=work["beta"],
      max_length=None,
      precompute_ref_log_probs=settings.get("precompute", True),
      train_sampling_strategy="sequential",
    )
    self.trainer = trl.DPOTrainer(
      model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    self.pairs = len(rows)
    self.trainer.train()
    first = self.trainer.state.log_history[0]
    wanted = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    self.check = {"tokens": self._tokens()} | {name: float(first[name]) for name in wanted}

  def run(self, seed: int) -> dict[str, float]:
    """One pass over the pairs."""
    self.trainer.train()
    return {"units": self.pairs}

  def _tokens(self) -> int:
    data = self.trainer.train_dataset
    sides = [*data["chosen_ids"], *data["rejected_ids"]]
    return 2 * sum(map(len, data["prompt_ids"])) + sum(map(len, sides))


class Round:
  """TRL's online DPO: two responses a prompt, a reward model that ranks them, a DPO step."""

  packages = ("trl", "transformers", "torch")

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    tokenizer = hf.AutoTokenizer.from_pretrained(work["policy"])
    model = hf.AutoModelForCausalLM.from_pretrained(work["policy"], dtype=settings["weights"])
    reward = hf.AutoModelForSequenceClassification.from_pretrained(work["reward"], dtype=torch.bfloat16)
    self.prompts, self.responses = len(work["messages"]), _Lengths(work["stop"])
    arguments = OnlineDPOConfig(
      **_training(work, settings),
      beta=[work["beta"]],
      max_new_tokens=work["max_new_tokens"],
      max_length=work["max_tokens"],
      temperature=1.0,
    )
    self.trainer = OnlineDPOTrainer(
      model,
      reward_funcs=[reward, self.responses],
      reward_processing_classes=[hf.AutoTokenizer.from_pretrained(work["reward"]), None],
      args=arguments,
      train_dataset=Dataset.from_list([{"prompt": messages} for messages in work["messages"]]),
      processing_class=tokenizer,
    )
    self.run(0)

  def run(self, seed: int) -> dict[str, float]:
    """One pass over the prompts."""
    self.responses.lengths.clear()
    self.trainer.args.seed = seed
    self.trainer.train()
    lengths = self.responses.lengths
    pairs, mean = len(lengths) // 2, float(np.mean(lengths))
    return {"units": self.prompts, "responses": len(lengths), "pairs": pairs, "tokens_a_response": mean}


class _Lengths:
  """A reward function that rewards nothing and remembers how long the responses were."""

  __name__ = "lengths"

  def __init__(self, stop: Sequence[int]):
    self.stop, self.lengths = stop, []

  def __call__(self, completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
    self.lengths += useful_lengths(np.asarray(completion_ids), self.stop)
    return [0.0] * len(completion_ids)


def useful_lengths(tokens: np.ndarray, stop: Sequence[int]) -> list[int]:
  """The length of each row up to its first end token, with it."""
  ends = np.isin(tokens, stop)
  return np.where(ends.any(1), ends.argmax(1) + 1, tokens.shape[1]).tolist()


def _training(work: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments that both trainers take: AdamW in one fused kernel, bfloat16 autocast, one pass, nothing saved."""
  batch = min(settings["batch"], work["batch_size"])
  return {
    "output_dir": tempfile.mkdtemp(),
    "per_device_train_batch_size": batch,
    "gradient_accumulation_steps": work["batch_size"] // batch,
    "gradient_checkpointing": settings["checkpointing"],
    "num_train_epochs": 1,
    "learning_rate": work["learning_rate"],
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "bf16": True,
    "use_cpu": DEVICE.type == "cpu",
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": DEVICE.type == "cuda",
  }

"""What both sides are given: prompts, preference pairs, texts to score, reward models. Made once, then cached."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Side
from benchmarks.terminal import note
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import evenly, fingerprint, read_preferences, read_prompts, write_jsonl
from tsalign_jax.demo_prompts import generate
from tsalign_jax.scoring.reward import conversation_text
from tsalign_jax.types import PreferencePair, Prompt, UserError

LONGEST_PROMPT = 512  # tokens
LONGEST_RESPONSE = 256
GENERATED = 256  # prompts
ANSWERED = 64  # prompts whose sampled answers become pairs
JOINED = 3  # generated prompts in one such prompt, so that it has about 128 tokens


def prompts(options: argparse.Namespace, count: int) -> list[Prompt]:
  """`count` prompts from all over the file, without the over-long ones."""
  chat = load_chat(options)
  source = options.prompts or str(_generated(options))
  fitting = [prompt for prompt in read_prompts(source) if len(chat.prompt_tokens(prompt.messages)) <= LONGEST_PROMPT]
  if len(fitting) < count:
    raise UserError(f"{source}: {count} prompts of at most {LONGEST_PROMPT} tokens are needed, it has {len(fitting)}")
  return list(evenly(fitting, count))


def pairs(options: argparse.Namespace, count: int, *, prompt_tokens: int) -> list[dict[str, Any]]:
  """The `count` pairs whose prompts are nearest to that many tokens, as text and as tokens.

  Only pairs whose text has the same tokens in one piece as in two: TRL tokenises prompt and response together.
  """
  chat, rows = load_chat(options), []
  source, found = _preferences(options)
  for pair in found:
    row = _tokens(chat, pair)
    if max(len(row["chosen_tokens"]), len(row["rejected_tokens"])) <= LONGEST_RESPONSE and _same_in_one(chat, row):
      rows.append(row)
  if len(rows) < count:
    raise UserError(
      f"{source}: {count} pairs with responses of at most {LONGEST_RESPONSE} tokens are needed, it has {len(rows)}"
    )
  nearest = sorted(range(len(rows)), key=lambda index: abs(len(rows[index]["prompt_tokens"]) - prompt_tokens))
  return [rows[index] for index in sorted(nearest[:count])]


def texts_to_score(
  options: argparse.Namespace, count: int, responses: int, *, prompt_tokens: int, response_tokens: int
) -> list[dict[str, Any]]:
  """Prompts with responses nearest to those lengths; the responses are real, but answer other prompts."""
  chat, (source, found) = load_chat(options), _preferences(options)
  lengths = {}
  for pair in found:
    lengths |= {text: len(chat.response_tokens(text)) for text in (pair.chosen, pair.rejected) if text.strip()}
  wanted = count * responses
  pool = sorted(lengths, key=lambda text: abs(lengths[text] - response_tokens))[:wanted]
  pool = [pool[index % len(pool)] for index in range(wanted)]
  order = np.random.default_rng(0).permutation(wanted)
  distinct = {json.dumps(pair.prompt): pair.prompt for pair in found}.values()
  chosen = sorted(distinct, key=lambda prompt: abs(len(chat.prompt_tokens(prompt)) - prompt_tokens))[:count]
  if len(chosen) < count:
    raise UserError(f"{source}: {count} different prompts are needed, it has {len(chosen)}")
  return [
    {
      "messages": prompt,
      "plain": conversation_text(prompt),
      "responses": [pool[order[row * responses + column]] for column in range(responses)],
    }
    for row, prompt in enumerate(chosen)
  ]


def load_chat(options: argparse.Namespace) -> Chat:
  """The tokenizer and chat template of the policy."""
  _named(options.policy)
  return Chat.load(options.policy)


def templated(chat: Chat, messages: Sequence[dict]) -> str:
  """A prompt as text, up to where the answer begins."""
  return chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def reward_model(options: argparse.Namespace, kind: str) -> Path:
  """The folder of the decoder or encoder with a random one-label head, the same for both sides; made once."""
  source = options.policy if kind == "decoder" else options.encoder
  folder = options.cache / f"{_named(source)}_reward"
  if not folder.is_dir():
    note(f"making {folder}")
    work = {"source": str(source), "target": str(folder)}
    with Side("head", "benchmarks.hugging_face:RewardHead").start(work, {}, options.cache) as worker:
      worker.ready()
  return folder


def _named(folder: Path) -> str:
  """The name of a model's folder, and whatever else tells it from another of that name."""
  if not folder.is_dir():
    raise UserError(f"{folder}: there is no such model; `make models/smollm2 models/minilm` makes the default")
  return f"{folder.name}_{fingerprint(folder)[:8]}"


def _generated(options: argparse.Namespace) -> Path:
  file = options.cache / "prompts.jsonl"
  return file if file.is_file() else write_jsonl(generate(GENERATED, 1, 0)[0], file)


def _preferences(options: argparse.Namespace) -> tuple[str, list[PreferencePair]]:
  """A source, and its pairs of responses that say something."""
  source = options.pairs or str(_sampled_pairs(options))
  return source, [pair for pair in read_preferences(source) if pair.chosen.strip() and pair.rejected.strip()]


def _sampled_pairs(options: argparse.Namespace) -> Path:
  """Answers of the policy to generated prompts, two by two; which one is better does not matter to a clock."""
  file = options.cache / f"{_named(options.policy)}_pairs.jsonl"
  if file.is_file():
    return file
  chat, found = load_chat(options), read_prompts(str(_generated(options)))
  note(f"sampling {file}")
  parts = [found[index * JOINED : (index + 1) * JOINED] for index in range(ANSWERED)]
  joined = [[{"role": "user", "content": "\n\n".join(p.messages[-1]["content"] for p in part)}] for part in parts]
  work = {
    "policy": str(options.policy),
    "prompts": [chat.prompt_tokens(messages) for messages in joined],
    "responses": 8,
    "max_new_tokens": 128,
    "stop": chat.stop_tokens,
  }
  with Side("answers", "benchmarks.ours:Answers", hide=("torch",)).start(work, {}, options.cache) as worker:
    worker.ready()
    answers = worker.run(0)["texts"]
  rows = [
    {"prompt": messages, "chosen": texts[index], "rejected": texts[index + 1]}
    for messages, texts in zip(joined, answers, strict=True)
    for index in range(0, len(texts), 2)
  ]
  return write_jsonl(rows, file)


def _tokens(chat: Chat, pair: PreferencePair) -> dict[str, Any]:
  return {
    "prompt": templated(chat, pair.prompt),
    "chosen": pair.chosen,
    "rejected": pair.rejected,
    "prompt_tokens": chat.prompt_tokens(pair.prompt),
    "chosen_tokens": chat.response_tokens(pair.chosen),
    "rejected_tokens": chat.response_tokens(pair.rejected),
  }


def _same_in_one(chat: Chat, row: dict[str, Any]) -> bool:
  end = chat.tokenizer.decode([chat.stop_tokens[0]])
  return all(
    chat.tokenizer.encode(row["prompt"] + row[side] + end, add_special_tokens=False)
    == row["prompt_tokens"] + row[f"{side}_tokens"]
    for side in ("chosen", "rejected")
  )

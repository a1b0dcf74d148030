"""prepare: prompts from the user's files to tables, tokenised and checked before any device program starts."""

import json
from collections import Counter
from collections.abc import Set

from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import HELD_OUT, evenly, prompt_key, read_prompts
from tsalign_jax.data.tables import PROMPTS, write_table
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.types import Prompt, UserError

SPARED = "beyond prompts.heldout_limit"  # not measured on, and not learned from
AGAIN = "the prompt is there already"


def prepare(job: Job) -> Counts:
  """Writes the training and the held-out prompts; what cannot be used stays in the table with the reason."""
  chat, limit = Chat.load(job.config.policy.path), job.config.prompts.max_tokens
  counts: Counts = {}
  held_out: set[str] = set()
  for split in ("heldout", "train"):
    source = getattr(job.config.prompts, split)
    prompts = read_prompts(source)
    seen: set[tuple[str, str]] = set()
    rows = [_row(prompt, chat, limit, held_out, seen) for prompt in prompts]
    usable = [row for row in rows if row["dropped"] is None]
    if not usable:
      raise UserError(f"{source}: every prompt is longer than prompts.max_tokens = {limit}, or held out")
    if split == "heldout":
      held_out = {prompt_key(prompt.messages) for prompt in prompts}
      usable = evenly(usable, job.config.prompts.heldout_limit or len(usable))
      measured = {row["prompt_id"] for row in usable}
      rows = [row if row["dropped"] or row["prompt_id"] in measured else row | {"dropped": SPARED} for row in rows]
    write_table(job.writes[split], rows, PROMPTS)
    warm = job.config.student.warm_start
    if split == "train" and warm and warm.prompts >= len(usable):
      raise UserError(
        f"{source}: the warm start alone takes student.warm_start.prompts = {warm.prompts} of the {len(usable)} usable "
        "prompts; give more prompts, or take fewer"
      )
    counts[f"{split}_prompts"] = len(usable)
    counts[f"{split}_dropped"] = Counter(row["dropped"] for row in rows if row["dropped"])
  return counts


def _row(prompt: Prompt, chat: Chat, limit: int, held_out: Set[str], seen: set[tuple[str, str]]) -> dict:
  """The prompt as a row of its table; `seen` grows by it."""
  tokens, checks, key = chat.prompt_tokens(prompt.messages), json.dumps(prompt.checks), prompt_key(prompt.messages)
  dropped = f"longer than {limit} tokens" if len(tokens) > limit else None
  if key in held_out:
    dropped = HELD_OUT
  elif (key, checks) in seen:
    dropped = AGAIN
  seen.add((key, checks))
  return {
    "prompt_id": prompt.id,
    "prompt": prompt.messages,
    "checks": checks,
    "tokens": tokens,
    "dropped": dropped,
  }

"""prepare: prompts from the user's files to tables, tokenised and checked before any device program starts."""

import json

from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import evenly, read_prompts
from tsalign_jax.data.tables import PROMPTS, write_table
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.types import Prompt, UserError


def prepare(job: Job) -> Counts:
  """Writes the training and the held-out prompts; over-long ones stay in the table with the reason."""
  chat = Chat.load(job.config.policy.path)
  teacher = build_teacher(job.config)
  counts: Counts = {}
  for split in ("train", "heldout"):
    source = getattr(job.config.prompts, split)
    prompts = read_prompts(source)
    teacher.validate_prompts(prompts, source)
    rows = [_row(prompt, chat, job.config.prompts.max_tokens) for prompt in prompts]
    usable = [row for row in rows if row["dropped"] is None]
    if not usable:
      raise UserError(f"{source}: every prompt is longer than prompts.max_tokens = {job.config.prompts.max_tokens}")
    if split == "heldout":
      usable = evenly(usable, job.config.prompts.heldout_limit or len(usable))
    too_long = [row for row in rows if row["dropped"]]
    write_table(job.writes[split], sorted([*usable, *too_long], key=lambda row: row["prompt_id"]), PROMPTS)
    warm = job.config.student.warm_start
    if split == "train" and warm and warm.prompts >= len(usable):
      raise UserError(
        f"{source}: the warm start alone takes student.warm_start.prompts = {warm.prompts} of the {len(usable)} usable "
        "prompts; give more prompts, or take fewer"
      )
    counts[f"{split}_prompts"] = len(usable)
    counts[f"{split}_dropped"] = len(too_long)
  return counts


def _row(prompt: Prompt, chat: Chat, limit: int) -> dict:
  tokens = chat.prompt_tokens(prompt.messages)
  too_long = f"prompt longer than {limit} tokens" if len(tokens) > limit else None
  return {
    "prompt_id": prompt.id,
    "prompt": prompt.messages,
    "checks": json.dumps(list(prompt.checks)),
    "tokens": tokens,
    "dropped": too_long,
  }

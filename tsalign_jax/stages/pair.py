"""pair: verdicts to preference pairs; the teacher's order wins, and everything dropped is named."""

from collections import Counter

from tsalign_jax.data.tables import PAIRS, read_table, write_table
from tsalign_jax.stages.base import Counts, Job, in_words
from tsalign_jax.types import UserError, Verdict

REASONS = {
  Verdict.TIE: "teacher sees a tie",
  Verdict.INCONSISTENT: "teacher contradicts itself",
  Verdict.ERROR: "teacher failed",
}


def pair(job: Job) -> Counts:
  """Writes `pairs`, one row for each verdict that names a better response, in a format that TRL reads.

  Raises UserError when no pair is left. Of the others, which `verdicts` holds, the counts tell.
  """
  prompts = {row["prompt_id"]: row for row in read_table(job.reads["prompts"])}
  responses = {(row["prompt_id"], row["response_id"]): row for row in read_table(job.reads["responses"])}
  margins = {
    (row["prompt_id"], row["first"], row["second"]): row["margin"]
    for row in read_table(job.reads["candidates"], used_only=True)
  }
  table, dropped = [], Counter()
  for row in read_table(job.reads["verdicts"]):
    verdict = Verdict(row["verdict"])
    if verdict in REASONS:
      dropped[REASONS[verdict]] += 1
      continue
    order = ("first", "second") if verdict == Verdict.FIRST else ("second", "first")
    chosen, rejected = (responses[row["prompt_id"], row[side]] for side in order)
    table.append(
      {
        "prompt_id": row["prompt_id"],
        "prompt": prompts[row["prompt_id"]]["prompt"],
        "chosen": [{"role": "assistant", "content": chosen["text"]}],
        "rejected": [{"role": "assistant", "content": rejected["text"]}],
        "prompt_tokens": prompts[row["prompt_id"]]["tokens"],
        "chosen_tokens": chosen["tokens"],
        "rejected_tokens": rejected["tokens"],
        "flipped": _flipped(verdict, margins[row["prompt_id"], row["first"], row["second"]]),
      }
    )
  if not table:
    raise UserError(
      f"{job.name}: the teacher decided no pair ({in_words(dropped)}); begin a run in another folder, with more "
      "prompts a round or more responses"
    )
  write_table(job.writes["pairs"], table, PAIRS)
  flips = [row["flipped"] for row in table if row["flipped"] is not None]
  flip_rate = sum(flips) / len(flips) if flips else None
  return {"pairs": len(table), "flip_rate": flip_rate, "dropped": dict(sorted(dropped.items()))}


def _flipped(verdict: Verdict, margin: float | None) -> bool | None:
  """Whether the teacher reversed the student's order; None where the student has none."""
  if not margin:
    return None
  return (verdict == Verdict.SECOND) == (margin > 0)

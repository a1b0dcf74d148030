"""pair: verdicts to preference pairs; the teacher's order wins, and everything dropped is named."""

from collections import Counter

from tsalign_jax.data.tables import PAIRS, read_table, write_table
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.types import UserError, Verdict

REASONS = {
  Verdict.TIE: "teacher sees a tie",
  Verdict.INCONSISTENT: "teacher contradicts itself",
  Verdict.ERROR: "teacher failed",
}


def pair(job: Job) -> Counts:
  """Writes `pairs`, one row a verdict, in a format that TRL reads. Raises UserError when no pair is left."""
  prompts = {row["prompt_id"]: row for row in read_table(job.reads["prompts"])}
  responses = {(row["prompt_id"], row["response_id"]): row for row in read_table(job.reads["responses"])}
  margins = {
    (row["prompt_id"], row["first"], row["second"]): row["margin"]
    for row in read_table(job.reads["candidates"], used_only=True)
  }
  table = []
  for row in read_table(job.reads["verdicts"]):
    order = ("first", "second") if row["verdict"] != Verdict.SECOND else ("second", "first")
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
        "flipped": _flipped(Verdict(row["verdict"]), margins[row["prompt_id"], row["first"], row["second"]]),
        "dropped": REASONS.get(Verdict(row["verdict"])),
      }
    )
  kept = [row for row in table if row["dropped"] is None]
  dropped = Counter(row["dropped"] for row in table if row["dropped"])
  if not kept:
    raise UserError(f"{job.name}: the teacher decided no pair ({dict(dropped)}); sample more prompts or responses")
  write_table(job.writes["pairs"], table, PAIRS)
  flips = [row["flipped"] for row in kept if row["flipped"] is not None]
  flip_rate = sum(flips) / len(flips) if flips else None
  return {"pairs": len(kept), "flip_rate": flip_rate, "dropped": dict(sorted(dropped.items()))}


def _flipped(verdict: Verdict, margin: float | None) -> bool | None:
  """Whether the teacher reversed the student's order; None where either of them has none."""
  if verdict not in (Verdict.FIRST, Verdict.SECOND) or not margin:
    return None
  return (verdict == Verdict.SECOND) == (margin > 0)

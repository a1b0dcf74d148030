"""mine: the candidate pairs that are worth a teacher's look."""

from collections import Counter

from tsalign_jax.data.tables import CANDIDATES, Rows, by_prompt, read_table, write_table
from tsalign_jax.pairing.mine import best_worst, random_pairs, usable
from tsalign_jax.stages.base import Counts, Job


def mine(job: Job) -> Counts:
  """Writes `candidates`: one best/worst pair a prompt, or `pairs` random ones. Dropped prompts keep a row.

  Options: `strategy`, and `pairs` for the random one.
  """
  responses = by_prompt(read_table(job.reads["responses"]))
  scores = by_prompt(read_table(job.reads["scores"])) if "scores" in job.reads else {}
  table = [row for i, rows in responses.items() for row in _candidates(job, i, rows, scores.get(i))]
  write_table(job.writes["candidates"], table, CANDIDATES)
  dropped = Counter(row["dropped"] for row in table if row["dropped"])
  return {"candidates": len(table) - dropped.total(), "dropped": dict(sorted(dropped.items()))}


def _candidates(job: Job, prompt_id: int, responses: Rows, scores: Rows | None) -> Rows:
  texts, finishes = [row["text"] for row in responses], [row["finish"] for row in responses]
  indices = usable(texts, finishes, drop_truncated=job.config.mining.drop_truncated)
  if isinstance(indices, str):
    return [_row(prompt_id, dropped=indices)]
  if job.options["strategy"] == "random":
    pairs = random_pairs(indices, job.options["pairs"], (job.seed, prompt_id))
    return [_row(prompt_id, first, second, _margin(scores, first, second)) for first, second in pairs]
  found = best_worst(indices, [row["score"] for row in scores], min_margin=job.config.mining.min_margin)
  return [_row(prompt_id, dropped=found) if isinstance(found, str) else _row(prompt_id, *found)]


def _margin(scores: Rows | None, first: int, second: int) -> float | None:
  return scores[first]["score"] - scores[second]["score"] if scores else None


def _row(prompt_id: int, first=None, second=None, margin=None, dropped: str | None = None) -> dict:
  return {"prompt_id": prompt_id, "first": first, "second": second, "margin": margin, "dropped": dropped}

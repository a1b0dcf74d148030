"""mine: the candidate pairs that are worth a teacher's look."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tsalign_jax.config import Mining
from tsalign_jax.data.tables import CANDIDATES, Rows, by_prompt, read_table, write_table
from tsalign_jax.pairing.mine import best_worst, random_pairs, usable
from tsalign_jax.stages.base import Counts, Job, in_words
from tsalign_jax.types import UserError


def mine(job: Job) -> Counts:
  """Writes `candidates`: one best/worst pair a prompt, or `pairs` random ones. Dropped prompts keep a row.

  Options: `strategy`, and `pairs` for the random one. Raises UserError when no pair is left.
  """
  responses = by_prompt(read_table(job.reads["responses"]))
  scores = by_prompt(read_table(job.reads["scores"])) if "scores" in job.reads else {}
  settings = (job.config.mining, job.options, job.seed)
  table = [row for i, rows in responses.items() for row in candidates(*settings, i, rows, scores.get(i))]
  dropped = Counter(row["dropped"] for row in table if row["dropped"])
  if dropped.total() == len(table):
    raise UserError(
      f"{job.name}: no prompt has two responses to choose between ({in_words(dropped)}); begin a run in another "
      "folder, with other settings of mining, or a higher sampling.max_new_tokens or temperature"
    )
  write_table(job.writes["candidates"], table, CANDIDATES)
  return {"candidates": len(table) - dropped.total(), "dropped": dict(sorted(dropped.items()))}


def candidates(
  mining: Mining, options: Mapping[str, Any], seed: int, prompt_id: int, responses: Rows, scores: Rows | None
) -> Rows:
  """The candidates of one prompt, or one row that says why it has none; options and seed are those of the stage."""
  indices = minable(mining, responses)
  if isinstance(indices, str):
    return [_row(prompt_id, dropped=indices)]
  if options["strategy"] == "random":
    pairs = random_pairs(indices, options["pairs"], (seed, prompt_id))
    return [_row(prompt_id, first, second, _margin(scores, first, second)) for first, second in pairs]
  found = best_worst(indices, [row["score"] for row in scores], min_margin=mining.min_margin)
  return [_row(prompt_id, dropped=found) if isinstance(found, str) else _row(prompt_id, *found)]


def minable(mining: Mining, responses: Rows) -> list[int] | str:
  """Indices of a prompt's responses that may be paired, or why it has none."""
  texts, finishes = [row["text"] for row in responses], [row["finish"] for row in responses]
  return usable(texts, finishes, drop_truncated=mining.drop_truncated)


def _margin(scores: Rows | None, first: int, second: int) -> float | None:
  return scores[first]["score"] - scores[second]["score"] if scores else None


def _row(prompt_id: int, first=None, second=None, margin=None, dropped: str | None = None) -> dict:
  return {"prompt_id": prompt_id, "first": first, "second": second, "margin": margin, "dropped": dropped}

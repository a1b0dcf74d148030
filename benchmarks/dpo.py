"""Pairs a second and peak memory of a DPO step: `python -m benchmarks.dpo`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contest import Runs, Side, contest, making_up, ours, ratio
from benchmarks.optional import TUNIX, add_tunix, tunix
from benchmarks.terminal import add_pairs, add_tuning, command, parser
from benchmarks.workload import pairs
from tsalign_jax.types import UserError

PEER = "TRL"
# Relative differences, from bfloat16: of the first step's loss, log-probabilities and gradient norm.
TOLERANCE = {"tokens": 0.0, "loss": 0.01, "logps/chosen": 0.02, "logps/rejected": 0.02, "grad_norm": 0.2}
OURS = [
  {"microbatch_tokens": 2048, "remat": False},
  {"microbatch_tokens": 1024, "remat": False},
  {"microbatch_tokens": 4096, "remat": False},
  {"microbatch_tokens": 2048, "remat": True},
]
THEIRS = [
  {"batch": 4, "checkpointing": False},
  {"batch": 8, "checkpointing": False},
  {"batch": 16, "checkpointing": False},
  {"batch": 8, "checkpointing": False, "attention": "eager"},
  {"batch": 8, "checkpointing": True},
  {"batch": 8, "checkpointing": False, "precompute": False},
  {"batch": 8, "checkpointing": False, "weights": "bfloat16"},
]


def main() -> Mapping[str, float]:
  """Ratios of speed and of peak memory, after a table."""
  out = parser(__doc__.splitlines()[0])
  add_tuning(out)
  add_pairs(out)
  out.add_argument("--count", type=int, default=64, help="pairs")
  out.add_argument("--batch-size", type=int, default=32, help="pairs an optimizer step")
  out.add_argument("--prompt-tokens", type=int, default=128, help="pairs with prompts nearest to this length are taken")
  add_tunix(out)
  options = out.parse_args()
  work = {
    "policy": str(options.policy),
    "pairs": alike_together(pairs(options, options.count, prompt_tokens=options.prompt_tokens), options.batch_size),
    "batch_size": options.batch_size,
    "learning_rate": 1e-6,
    "beta": 0.1,
  }
  size = options.batch_size
  peer = Side(PEER, "benchmarks.hugging_face:Dpo", making_up(size, THEIRS))
  sides = [ours("Dpo", OURS), peer, *tunix(options, "Dpo", making_up(size, TUNIX))]
  results = contest("DPO step", sides, work, options, unit="pairs/s", agree=same_step, eligible=keeps_small_steps)
  ratios = {"dpo_step": ratio(results, PEER), "dpo_memory": ratio(results, PEER, peak_memory)}
  return ratios | {f"dpo_step_{name}": ratio(results, name) for name in list(results)[2:]}


def alike_together(rows: Sequence[Mapping[str, Any]], size: int) -> list[Mapping[str, Any]]:
  """The same steps of `size` pairs, each with the longest first: who pads a batch to its longest pair, pads least."""

  def longest(row: Mapping[str, Any]) -> int:
    return len(row["prompt_tokens"]) + max(len(row["chosen_tokens"]), len(row["rejected_tokens"]))

  steps = (rows[start : start + size] for start in range(0, len(rows), size))
  return [row for step in steps for row in sorted(step, key=longest, reverse=True)]


def peak_memory(runs: Runs) -> float:
  """GiB that the process held at most, from its start to the end of its last run."""
  return max(run["peak_gib"] for run in runs)


def keeps_small_steps(settings: Mapping[str, Any]) -> bool:
  """False where weights are trained in bfloat16, which loses steps of 1e-6: shown, but another training."""
  return settings.get("weights") != "bfloat16"


def same_step(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
  """The first step in numbers; UserError unless both sides trained on the same tokens and nearly agree."""
  for name, tolerance in TOLERANCE.items():
    if name in theirs and not np.isclose(ours[name], theirs[name], rtol=tolerance, atol=0):
      raise UserError(f"in the first step, {name} is {ours[name]:g} on our side and {theirs[name]:g} on the other")
  facts = ", ".join(f"{name} {ours[name]:,.5g} | {theirs[name]:,.5g}" for name in TOLERANCE if name in theirs)
  return f"First step, ours | theirs: {facts}."


if __name__ == "__main__":
  command(main)

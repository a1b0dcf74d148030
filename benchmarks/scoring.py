"""Sequences a second while scoring K responses a prompt with a reward model: `python -m benchmarks.scoring`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Side, contest, ours, ratio
from benchmarks.terminal import add_pairs, add_tuning, command, parser
from benchmarks.workload import reward_model, texts_to_score
from tsalign_jax.types import UserError

PEER = "transformers"
LIMIT = 512  # tokens of a prompt with its response
LEAST_CORRELATION = 0.98  # in bfloat16, which two libraries round differently; in float32 they agree to six digits
OURS = [{"batch_tokens": tokens} for tokens in (2048, 4096, 8192)]
THEIRS = [
  {"batch": 32, "attention": "sdpa"},
  {"batch": 16, "attention": "sdpa"},
  {"batch": 64, "attention": "sdpa"},
  {"batch": 128, "attention": "sdpa"},
  {"batch": 32, "attention": "eager"},
]


def main() -> Mapping[str, float]:
  """Ratios of speed for both kinds of reward model, after a table for each."""
  out = parser(__doc__.splitlines()[0])
  add_tuning(out)
  add_pairs(out)
  out.add_argument("--count", type=int, default=32, help="prompts")
  out.add_argument("--responses", type=int, default=16, help="responses a prompt")
  out.add_argument("--prompt-tokens", type=int, default=128, help="prompts nearest to this length are taken")
  out.add_argument("--response-tokens", type=int, default=96, help="responses nearest to this length are taken")
  out.add_argument("--encoder", type=Path, default=Path("models/minilm"), help="encoder, a Hugging Face folder")
  options = out.parse_args()
  sizes = {"prompt_tokens": options.prompt_tokens, "response_tokens": options.response_tokens}
  items = texts_to_score(options, options.count, options.responses, **sizes)
  ratios = {}
  for kind in ("decoder", "encoder"):
    work = {"kind": kind, "model": str(reward_model(options, kind)), "items": items, "max_tokens": LIMIT}
    sides = [ours("Scoring", OURS), Side(PEER, "benchmarks.hugging_face:Scoring", THEIRS)]
    results = contest(f"Scoring, {kind}", sides, work, options, unit="sequences/s", agree=same_scores)
    ratios[f"scoring_{kind}"] = ratio(results, PEER)
  return ratios


def same_scores(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
  """How alike the scores are; UserError unless both sides read the same number of tokens and nearly agree."""
  if ours["tokens"] != theirs["tokens"]:
    raise UserError(f"the sides read {ours['tokens']} and {theirs['tokens']} tokens")
  correlation = np.corrcoef(np.ravel(ours["scores"]), np.ravel(theirs["scores"]))[0, 1]
  if correlation < LEAST_CORRELATION:
    raise UserError(f"the scores of the two sides correlate by {correlation:.4f} only")
  return f"The sides read the same {ours['tokens']:,} tokens; their scores correlate by {correlation:.5f}."


if __name__ == "__main__":
  command(main)

"""Prompts a second through a whole round, sampled, scored, paired and trained on: `python -m benchmarks.round`."""

from collections.abc import Mapping
from statistics import median

from benchmarks.contest import Runs, Side, contest, making_up, ours, ratio
from benchmarks.terminal import add_prompts, add_tuning, command, parser
from benchmarks.workload import load_chat, prompts, reward_model

PEER = "TRL online DPO"
RESPONSES = 2  # a prompt: TRL's online DPO knows no other number
OURS = [{"batch_prompts": batch, "batch_tokens": 2048, "microbatch_tokens": 2048} for batch in (64, 32)]
THEIRS = [
  {"batch": 16, "checkpointing": False, "weights": "bfloat16"},
  {"batch": 8, "checkpointing": False, "weights": "bfloat16"},
  {"batch": 32, "checkpointing": False, "weights": "bfloat16"},
  {"batch": 16, "checkpointing": False, "weights": "float32"},
]


def main() -> Mapping[str, float]:
  """The ratio of speed, after a table."""
  out = parser(__doc__.splitlines()[0])
  add_tuning(out)
  add_prompts(out)
  out.add_argument("--count", type=int, default=64, help="prompts")
  out.add_argument("--max-new-tokens", type=int, default=128, help="longest response")
  out.add_argument("--batch-size", type=int, default=32, help="pairs an optimizer step")
  options = out.parse_args()
  chat, chosen = load_chat(options), prompts(options, options.count)
  tokens = [chat.prompt_tokens(prompt.messages) for prompt in chosen]
  work = {
    "policy": str(options.policy),
    "reward": str(reward_model(options, "decoder")),
    "messages": [prompt.messages for prompt in chosen],
    "prompts": tokens,
    "responses": RESPONSES,
    "max_new_tokens": options.max_new_tokens,
    "max_tokens": max(map(len, tokens)) + options.max_new_tokens + 2,  # an answer, tokenised again, may grow
    "stop": chat.stop_tokens,
    "batch_size": options.batch_size,
    "learning_rate": 1e-6,
    "beta": 0.1,
  }
  sides = [ours("Round", OURS), Side(PEER, "benchmarks.hugging_face:Round", making_up(options.batch_size, THEIRS))]
  results = contest("A round", sides, work, options, unit="prompts/s")
  return {"round": ratio(results, PEER), "round_with_compilation": ratio(results, PEER, rate_with_compilation)}


def rate_with_compilation(runs: Runs) -> float:
  """Prompts a second of a round that also compiles for whatever lengths are new in it."""
  return median(run["units"] / (run["seconds"] + run["compiling"]) for run in runs)


if __name__ == "__main__":
  command(main)

"""Useful tokens a second while sampling K responses a prompt: `python -m benchmarks.sampling`.

Two workloads: responses of natural length, which end at their end token, and responses of one fixed length.
"""

from collections.abc import Mapping

from benchmarks.contest import Side, contest, ours, ratio
from benchmarks.optional import add_llama_cpp, add_tunix, llama_cpp, llama_cpp_work, tunix
from benchmarks.terminal import add_prompts, add_tuning, command, parser
from benchmarks.workload import load_chat, prompts

PEER = "transformers"
OURS = [{"batch_prompts": batch, "lanes": lanes} for batch, lanes in ((32, 8), (32, 4), (32, 2), (16, 8), (16, 4))]
THEIRS = [
  {"batch": 16, "attention": "sdpa"},
  {"batch": 8, "attention": "sdpa"},
  {"batch": 4, "attention": "sdpa"},
  {"batch": 32, "attention": "sdpa"},
  {"batch": 8, "attention": "eager"},
  {"batch": 32, "attention": "sdpa", "cache": "static"},
  {"engine": "continuous"},
]


def main() -> Mapping[str, float]:
  """Ratios of speed for both workloads, after a table for each."""
  out = parser(__doc__.splitlines()[0])
  add_tuning(out)
  add_prompts(out)
  out.add_argument("--count", type=int, default=32, help="prompts")
  out.add_argument("--responses", type=int, default=8, help="responses a prompt")
  out.add_argument("--max-new-tokens", type=int, default=128, help="longest response of natural length")
  out.add_argument("--fixed-tokens", type=int, default=64, help="length of the responses of fixed length")
  add_tunix(out)
  add_llama_cpp(out)
  options = out.parse_args()
  chat = load_chat(options)
  tokens = [chat.prompt_tokens(prompt.messages) for prompt in prompts(options, options.count)]
  work = {"policy": str(options.policy), "prompts": tokens, "responses": options.responses} | llama_cpp_work(options)
  natural = work | {"max_new_tokens": options.max_new_tokens, "stop": chat.stop_tokens}
  fixed = work | {"max_new_tokens": options.fixed_tokens, "stop": []}
  sides = [
    ours("Sampling", OURS),
    Side(PEER, "benchmarks.hugging_face:Sampling", THEIRS),
    *tunix(options, "Sampling"),
    *llama_cpp(options),
  ]
  ratios = {}
  for key, title, each in (("sampling", "natural lengths", natural), ("sampling_fixed", "fixed length", fixed)):
    results = contest(f"Sampling, {title}", sides, each, options, unit="tokens/s")
    ratios |= {key: ratio(results, PEER)}
    ratios |= {f"{key}_{name}": ratio(results, name) for name in list(results)[2:]}
  return ratios


if __name__ == "__main__":
  command(main)

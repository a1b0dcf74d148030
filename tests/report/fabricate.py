"""A run folder without a run: numbers that look like training, answers that try to break the page."""

import json
import math
import random
from pathlib import Path

import yaml

from tsalign_jax.data.tables import COMPARISONS, write_table

NASTY = 'Tea & <script>alert("tea")</script> for "two" </div>'
VERDICTS = ["first"] * 61 + ["tie"] * 12 + ["second"] * 27
SECONDS = {
  "sample": 412.0,
  "score": 31.0,
  "mine": 0.2,
  "judge": 3.1,
  "pair": 0.1,
  "align": 655.0,
  "distil": 120.0,
  "evaluate": 203.0,
}
TOPICS = ["tea", "the sea", "bicycles", "an old clock", "rain in the city", "a library at night", "bread", "maps"]
CONFIG = {
  "run": "runs/demo",
  "seed": 3,
  "recipe": "ts_align",
  "rounds": 3,
  "policy": {"path": "models/policy", "dtype": "bfloat16"},
  "student": {"path": "models/student", "max_tokens": 512},
  "teacher": {"kind": "checks", "default": [{"name": "max_words", "limit": 80}]},
}


def fabricate(run: Path, rounds: int, *, win_rate: float = 0.52, steps: int = 40) -> Path:
  """A run folder with so many finished rounds; each round wins 4 points more than the one before."""
  run.mkdir(parents=True)
  (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"rounds": max(3, rounds)}, sort_keys=False))
  for number in range(1, rounds + 1):
    folder = run / f"round_{number:02d}"
    folder.mkdir()
    metrics = round_metrics(number, win_rate + 0.04 * (number - 1))
    for file in (folder / "metrics.json", run / "metrics.json"):
      file.write_text(json.dumps(metrics))
    write_steps(folder, number, steps)
    write_comparisons(folder, VERDICTS)
  return run


def round_metrics(number: int, win_rate: float) -> dict:
  return {
    "round": number,
    "win_rate": win_rate,
    "win_rate_ci": [win_rate - 0.061, win_rate + 0.061],
    "wins": round(256 * win_rate) - 15,
    "ties": 30,
    "losses": 241 - round(256 * win_rate),
    "undecided": 7 if number == 2 else 0,
    "mean_length_base": 142.4,
    "mean_length_policy": 142.4 + 9 * number,
    "student_accuracy_mined": {"initial": 0.583, "now": 0.583 + 0.03 * number},
    "student_accuracy_random": {"initial": 0.641, "now": 0.641 + 0.03 * number},
    "student_accuracy_mined_ci": {"initial": [0.51, 0.66], "now": [0.54, 0.722]},
    "student_accuracy_random_ci": {"initial": [0.6, 0.7], "now": [0.612, 0.733]},
    "student_pairs": {"initial": {"mined": 119, "random": 471}, "now": {"mined": 117, "random": 471}},
    "kl_from_initial": 1.317 * number,
    "pairs": 1723 + number,
    "dropped": {"tie": 201, "same_answer": 13},
    "prompts_dropped": {"training": {"longer than 256 tokens": 2, "the prompt is held out": 1}, "held-out": {}},
    "seconds": SECONDS,
    "heldout_prompts": 128,
    "flip_rate": 0.31 - 0.02 * number,
    "student_calibration": {
      "initial": {"error": 0.21, "bins": []},
      "now": {
        "error": 0.21 - 0.04 * number,
        "bins": [
          {"confidence": 0.554, "accuracy": 0.531, "pairs": 301},
          {"confidence": 0.871, "accuracy": 0.9 - 0.01 * number, "pairs": 1207},
        ],
      },
    },
    "student_regret": {"pick": 0.25 + number, "random": 1.75 + number, "prompts": 64},
    "pairs_per_second": {"student": 412.4, "teacher": 3.75},
  }


def write_steps(folder: Path, number: int, steps: int) -> None:
  noise = random.Random(number)
  align, distil = [], []
  for step in range(steps):
    margin = 0.9 * (1 - math.exp(-3 * step / steps)) + noise.gauss(0, 0.08)
    align.append(
      {
        "step": step,
        "loss": 0.693 - 0.4 * margin,
        "rewards/chosen": margin * 0.3,
        "rewards/rejected": -margin * 0.7,
        "rewards/margins": margin,
        "rewards/accuracies": min(1.0, 0.5 + 0.4 * margin),
        "logps/chosen": -180 - 4 * number - 3 * margin,
        "logps/rejected": -190 - 4 * number - 11 * margin,
        "grad_norm": abs(noise.gauss(4, 1)),
        "learning_rate": 1e-6,
      }
    )
    loss = 0.69 * math.exp(-step / steps) + noise.gauss(0, 0.03)
    accuracy = 0.6 + 0.2 * step / steps
    distil.append({"step": step, "loss": loss, "accuracy": accuracy, "grad_norm": 1.0, "learning_rate": 1e-5})
  for name, rows in (("align", align), ("distil", distil)):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_comparisons(folder: Path, verdicts: list[str], answer: str = NASTY) -> None:
  rows = [comparison(index, verdict, answer) for index, verdict in enumerate(verdicts)]
  write_table(folder / "comparisons.parquet", rows, COMPARISONS)


def comparison(index: int, verdict: str, answer: str) -> dict:
  topic = TOPICS[index // 2 % len(TOPICS)]
  passed = {"score": 1.0, "failed": []}
  sides = {
    "first": passed if verdict == "first" else {"score": 0.5, "failed": ["max_words"]},
    "second": passed if verdict == "second" else {"score": 0.5, "failed": ["no_commas"]},
  }
  prompt = f"Write two short paragraphs about {topic}. Use at most 80 words and no commas."
  text = f"There is a kind of quiet in {topic}, and anyone who has waited long enough has heard it.\n\nIt stays."
  return {
    "prompt_id": index // 2,
    "response_id": index % 2,
    "prompt": [{"role": "user", "content": prompt}],
    "base": f"{text} Answer {index} of the base, with a comma.",
    "policy": f"{text} {answer} Answer {index}.",
    "verdict": verdict,
    "evidence": json.dumps(sides),
    "others": "{}",
  }

"""TS-Align with human preferences, and what is left of it without one of its parts: `python -m benchmarks.human`.

Trains a teacher and a student on human preferences, and a third reward model on other ones, the gold model, which only
evaluates. Then it runs `configs/hh_human.yaml` as it is and in three ablations, and prints both tables in markdown.
Everything lies in run folders, so the same command goes on where it was stopped.
"""

import argparse
import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.terminal import command, note, print_machine
from benchmarks.workers import WorkerError
from tsalign_jax.data.files import write_jsonl
from tsalign_jax.types import Conversation, UserError

CONFIGS = Path("configs")
TEACHER, STUDENT, GOLD = Path("runs/hh_reward"), Path("runs/hh_reward_minilm"), Path("runs/gold_reward")
MEASURING = ("answer", "evaluate")  # stages that label nothing and train nothing
LABELLING = ("score", "mine", "judge", "pair")
HELD_OUT = 5  # one in so many prompts of the gold model's human votes
# Models of AlpacaEval, better and worse, of which the better one does not simply say more.
TIERS = (
  ("text_davinci_003", "alpaca-7b"),
  ("text_davinci_003", "text_davinci_001"),
  ("gpt-3.5-turbo-0301", "vicuna-7b"),
)


class Variant(NamedTuple):
  """A run of the recipe, and whether it is the student's or the teacher's place that is taken by the other.

  `idle` are stages that every run of the recipe has, and that this variant could do without: nobody needs the
  student's scores of random pairs, or a second look of the model that picked the pair.
  """

  name: str
  run: Path
  overrides: tuple[str, ...]
  teacher_scores: bool = False
  student_judges: bool = False
  idle: tuple[str, ...] = ()


def variants() -> list[Variant]:
  """TS-Align first, then the ablations: of these one round, to be held against its first."""
  teacher = f"{{kind: reward_model, path: {TEACHER / 'model'}}}"
  return [
    Variant("TS-Align", Path("runs/hh_human"), ()),
    Variant(
      "random pairs",
      Path("runs/hh_human_random"),
      ("rounds=1", "mining.strategy=random", "distil=null"),
      idle=("score",),
    ),
    Variant(
      "student only",
      Path("runs/hh_human_student"),
      (
        "rounds=1",
        f"teacher.path={STUDENT / 'model'}",
        f"evaluation.judges.teacher={teacher}",
        "distil=null",
      ),
      student_judges=True,
      idle=("judge",),
    ),
    Variant(
      "teacher only",
      Path("runs/hh_human_teacher"),
      ("rounds=1", f"student.path={TEACHER / 'model'}", "distil=null"),
      teacher_scores=True,
      idle=("judge",),
    ),
  ]


def main() -> Mapping[str, float]:
  """TS-Align's win rates after the last round, after the tables."""
  out = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  out.add_argument("--data", type=Path, default=Path("data"), help="folder with hh_rlhf, tulu_human and alpaca_eval")
  out.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for each run of the recipe")
  options = out.parse_args()
  human, unseen = (options.data / "hh_rlhf" / f"preferences.{split}.jsonl" for split in ("train", "test"))
  train, heldout = _gold_preferences(options.data, unseen)
  preferences = (f"pairs.train=[{human}]", f"pairs.heldout={unseen}")
  _tsalign("train-reward", CONFIGS / "hh_reward.yaml", f"run={TEACHER}", *preferences)
  _tsalign("train-reward", CONFIGS / "hh_reward_minilm.yaml", f"run={STUDENT}", *preferences)
  gold = (f"run={GOLD}", f"pairs.train=[{train}]", f"pairs.heldout={heldout}")
  _tsalign("train-reward", CONFIGS / "hh_reward.yaml", *gold)
  gold_judge = f"evaluation.judges.gold={{kind: reward_model, path: {GOLD / 'model'}}}"
  shared = (f"prompts.train={human}", f"prompts.heldout={unseen}", f"distil.replay={human}", gold_judge)
  for variant in variants():
    _tsalign("run", CONFIGS / "hh_human.yaml", f"run={variant.run}", *shared, *options.overrides, *variant.overrides)
  print(reward_table({"teacher": TEACHER, "student": STUDENT, "gold": GOLD}))
  print(variant_table(variants()))
  print_machine()
  metrics = _metrics(variants()[0].run)
  return {"by_teacher": metrics["win_rate"], "by_gold": metrics["judges"]["gold"]["win_rate"]}


def reward_table(runs: Mapping[str, Path]) -> str:
  """Held-out accuracy of each reward model in markdown."""
  lines = ["| | pairs learned from | held-out pairs | right (95% interval) | longer wins |", "|---|---|---|---|---|"]
  for name, run in runs.items():
    of = _metrics(run)
    right, longer = (_with_interval(of[key], of[f"{key}_ci"]) for key in ("accuracy", "longer_wins"))
    lines.append(f"| {name} | {of['train_pairs']:,} | {of['heldout_pairs']:,} | {right} | {longer} |")
  return "\n".join(lines)


def variant_table(chosen: list[Variant]) -> str:
  """Every round of every variant in markdown; times without evaluation, and without stages that are idle there."""
  headings = ("pairs by", "round", "win rate by teacher (95% interval)", "by gold", "tokens, base → aligned")
  headings += ("responses the teacher read", "time to label", "time in all")
  lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
  for variant in chosen:
    stages = json.loads((variant.run / "manifest.json").read_text())["stages"]
    rounds = sorted({name.split("/")[0] for name in stages} - {"round_00"})
    for folder in rounds:
      lines.append(
        _row(variant, folder, {name.split("/")[1]: stages[name] for name in stages if name.startswith(folder)})
      )
  return "\n".join(lines)


def _row(variant: Variant, folder: str, stages: Mapping[str, Any]) -> str:
  metrics = _metrics(variant.run / folder)
  teacher = metrics["judges"]["teacher"] if variant.student_judges else metrics
  gold = metrics["judges"]["gold"]
  if variant.teacher_scores:
    read = stages["score"]["counts"]["scored"]
  else:
    read = 0 if variant.student_judges else 2 * sum(stages["judge"]["counts"]["verdicts"].values())
  busy = {name: entry["seconds"] for name, entry in stages.items() if name not in (*MEASURING, *variant.idle)}
  cells = [
    variant.name,
    str(int(folder.removeprefix("round_"))),
    _with_interval(teacher["win_rate"], teacher["win_rate_ci"]),
    _with_interval(gold["win_rate"], gold["win_rate_ci"]),
    f"{metrics['mean_length_base']:.0f} → {metrics['mean_length_policy']:.0f}",
    f"{read:,}",
    _duration(sum(seconds for name, seconds in busy.items() if name in LABELLING)),
    _duration(sum(busy.values())),
  ]
  return f"| {' | '.join(cells)} |"


def _gold_preferences(data: Path, unseen: Path) -> tuple[Path, Path]:
  """Files of preferences that neither teacher nor student learned from: human votes, and answers of unequal models.

  The votes on one in `HELD_OUT` prompts are held out. No prompt to learn from begins a conversation in `unseen`, where
  policies are evaluated.
  """
  votes = list(_votes(data / "tulu_human" / "preferences.jsonl"))
  tiers = _tiers(data / "alpaca_eval" / "answers_by_model.jsonl.gz")
  evaluated = {_opening(row["prompt"]) for row in _lines(unseen)}
  others = [row for row in (*votes, *tiers) if _opening(row["prompt"]) not in evaluated]
  train = [row for row in others if not _held_out(row["prompt"])]
  heldout = [row for row in votes if _held_out(row["prompt"])]
  folder = GOLD.with_name("gold_preferences")
  return write_jsonl(train, folder / "train.jsonl"), write_jsonl(heldout, folder / "heldout.jsonl")


def _held_out(prompt: Conversation | str) -> bool:
  """Whether it is the prompt, not the vote, so that all votes on a prompt stay together."""
  return zlib.crc32(_opening(prompt).encode()) % HELD_OUT == 0


def _opening(prompt: Conversation | str) -> str:
  """What the user says first."""
  return (prompt if isinstance(prompt, str) else prompt[0]["content"]).strip()


def _votes(file: Path) -> Iterator[dict[str, Any]]:
  for row in _lines(file):
    prompt = row["prompt"]
    if isinstance(prompt[0]["content"], list):  # a conversation inside of a message
      prompt = prompt[0]["content"]
    yield {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}


def _tiers(file: Path) -> Iterator[dict[str, Any]]:
  for index, row in enumerate(_lines(file)):
    better, worse = (row["answers"][name] for name in TIERS[index % len(TIERS)])
    yield {"prompt": row["prompt"], "chosen": _said(better), "rejected": _said(worse)}


def _said(text: str) -> list[dict[str, str]]:
  return [{"role": "assistant", "content": text}]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
  if not file.is_file():
    raise UserError(f"{file}: there is no such file; --data names the folder that it is looked for in")
  with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
    yield from map(json.loads, lines)


def _tsalign(what: str, config: Path, *overrides: str) -> None:
  """One command in a process of its own, as a user would give it."""
  note(f"tsalign {what} {config} {' '.join(overrides)}")
  done = subprocess.run([sys.executable, "-m", "tsalign_jax.cli", what, str(config), *overrides], check=False)
  if done.returncode:
    raise WorkerError(f"tsalign {what} {config} ended with exit code {done.returncode}")


def _metrics(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "metrics.json").read_text())


def _with_interval(share: float, bounds: tuple[float, float]) -> str:
  return f"{share:.1%} ({bounds[0]:.1%} to {bounds[1]:.1%})"


def _duration(seconds: float) -> str:
  return f"{seconds / 60:.1f} min"


if __name__ == "__main__":
  command(main)

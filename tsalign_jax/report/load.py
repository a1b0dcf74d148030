"""What a report needs of a run folder, as dataclasses. A number that is not there is None, never a guess."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tsalign_jax.types import Conversation, UserError, Verdict


@dataclasses.dataclass(frozen=True)
class Change:
  """A share when the run began and after a round."""

  initial: float | None = None
  now: float | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How far a student's certainty is from how often it is right; bins of {confidence, accuracy, pairs}."""

  error: float | None = None
  bins: list[dict[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Opinion:
  """The win rate by a judge who labelled no training pair."""

  win_rate: float | None = None
  win_rate_ci: tuple[float | None, float | None] = (None, None)
  undecided: int | None = None
  """Comparisons without a verdict that counts."""


@dataclasses.dataclass(frozen=True)
class Metrics:
  """The outcome of one finished round, field by field as in its metrics.json."""

  win_rate: float | None = None
  win_rate_ci: tuple[float | None, float | None] = (None, None)
  wins: int | None = None
  ties: int | None = None
  losses: int | None = None
  undecided: int | None = None
  mean_length_base: float | None = None
  mean_length_policy: float | None = None
  student_accuracy_mined: Change = Change()
  student_accuracy_random: Change = Change()
  student_accuracy_mined_ci: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
  student_accuracy_random_ci: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)
  student_pairs: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  """Pairs that the teacher decided of those that these accuracies are about: {now: {mined: 47, random: 171}}."""
  kl_from_initial: float | None = None
  pairs: int | None = None
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  prompts_dropped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  heldout_prompts: int | None = None
  flip_rate: float | None = None
  student_cut: int | None = None
  """Of the `student_scored` responses of the round, those that the student could not read with all of their prompt."""
  student_scored: int | None = None
  student_calibration: dict[str, Calibration] = dataclasses.field(default_factory=dict)
  student_regret: dict[str, float] = dataclasses.field(default_factory=dict)
  pairs_per_second: dict[str, float | None] = dataclasses.field(default_factory=dict)
  judges: dict[str, Opinion] = dataclasses.field(default_factory=dict)

  @property
  def calibration_error(self) -> Change:
    """The student's calibration error when the run began and after this round."""
    return Change(*(self.student_calibration.get(name, Calibration()).error for name in ("initial", "now")))

  @property
  def judged(self) -> int:
    """How many comparisons got a verdict that counts."""
    return (self.wins or 0) + (self.ties or 0) + (self.losses or 0)

  @property
  def outcome(self) -> str:
    """`better` or `worse` if the 95% interval excludes 50%, `same` if it does not, `unknown` without one."""
    low, high = self.win_rate_ci
    if self.win_rate is None or low is None or high is None:
      return "unknown"
    return "better" if low > 0.5 else "worse" if high < 0.5 else "same"


@dataclasses.dataclass(frozen=True)
class Round:
  """One round, finished if it has metrics; `align` and `distil` hold what each step logged.

  Round 0 is the preparation: it has no metrics, and steps of distil only if the student was warm-started.
  """

  number: int
  folder: Path
  metrics: Metrics | None
  align: list[dict[str, float | None]]
  distil: list[dict[str, float | None]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A run so far; `config` is the resolved configuration as text, `settings` the same as a dictionary."""

  folder: Path
  config: str
  settings: dict[str, Any]
  rounds: list[Round]

  @property
  def name(self) -> str:
    """The name of the folder."""
    return self.folder.resolve().name

  @property
  def finished(self) -> list[Round]:
    """Rounds that have been evaluated."""
    return [round for round in self.rounds if round.metrics]

  @property
  def samples_freely(self) -> bool:
    """Whether held-out answers are drawn as the policy says: at temperature 1, from all tokens."""
    plain = {"evaluation.temperature": 1, "sampling.top_p": 1, "sampling.top_k": 0, "sampling.min_p": 0}
    return all(self.setting(key) in (None, value) for key, value in plain.items())

  def setting(self, key: str) -> Any:
    """The value at a dotted key of the configuration, None if it is not set."""
    value: Any = self.settings
    for part in key.split("."):
      value = value.get(part) if isinstance(value, dict) else None
    return value


@dataclasses.dataclass(frozen=True)
class Comparison:
  """An answer of the base policy and one of the aligned policy to a held-out prompt; FIRST is the aligned one."""

  prompt_id: int
  response_id: int
  prompt: Conversation
  base: str
  policy: str
  verdict: Verdict
  evidence: dict[str, Any]

  def failed(self, side: str) -> list[str] | None:
    """Checks that the `policy` or `base` answer failed; None if the teacher's evidence does not say."""
    found = self.evidence.get("first" if side == "policy" else "second")
    names = found.get("failed") if isinstance(found, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else None


def load_run(folder: Path) -> Run:
  """The run in a folder, finished or not; raises UserError if the folder holds no run."""
  folder = Path(folder)
  text = read_configuration(folder)
  rounds = [_load_round(number, path) for number, path in round_folders(folder)]
  return Run(folder, text, yaml.safe_load(text) or {}, rounds)


def read_configuration(run: Path) -> str:
  """The configuration of the run in a folder, as text; UserError if it holds none, or one without rounds."""
  config = Path(run) / "config.yaml"
  if not config.is_file():
    raise UserError(f"{run}: not the folder of a run, as it holds no config.yaml")
  text = config.read_text(encoding="utf-8")
  if "pairs" in (yaml.safe_load(text) or {}):
    raise UserError(f"{run}: a reward model was trained here, without rounds; it is in {config.with_name('model')}")
  return text


def round_folders(run: Path) -> list[tuple[int, Path]]:
  """Number and folder of each round that has begun, in their order."""
  names = (re.fullmatch(r"round_(\d+)", path.name) for path in run.iterdir())
  return sorted((int(name[1]), run / name[0]) for name in names if name)


def load_comparisons(round: Round) -> list[Comparison]:
  """The held-out comparisons of a round, in file order; none if it kept none."""
  file = round.folder / "comparisons.parquet"
  if not file.is_file():
    return []
  columns = [field.name for field in dataclasses.fields(Comparison)]
  return [_comparison(row) for row in pq.read_table(file, columns=columns).to_pylist()]


def _load_round(number: int, folder: Path) -> Round:
  metrics = folder / "metrics.json"
  return Round(
    number,
    folder,
    _metrics(_parse(metrics.read_text(encoding="utf-8"))) if metrics.is_file() else None,
    _steps(folder / "align.jsonl"),
    _steps(folder / "distil.jsonl"),
  )


def _metrics(content: dict[str, Any]) -> Metrics:
  fields = [field.name for field in dataclasses.fields(Metrics)]
  known = {name: content[name] for name in fields if content.get(name) is not None}
  for name in ("student_accuracy_mined", "student_accuracy_random"):
    known[name] = Change(**known.get(name, {}))
  if "student_calibration" in known:
    known["student_calibration"] = {name: Calibration(**each) for name, each in known["student_calibration"].items()}
  if "win_rate_ci" in known:
    known["win_rate_ci"] = tuple(known["win_rate_ci"])
  if "judges" in known:
    known["judges"] = {
      name: Opinion(each.get("win_rate"), tuple(each.get("win_rate_ci", (None, None))), each.get("undecided"))
      for name, each in known["judges"].items()
    }
  return Metrics(**known)


def _steps(file: Path) -> list[dict[str, float | None]]:
  if not file.is_file():
    return []
  # A stage that is running may be in the middle of its last line.
  whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
  return [_parse(line) for line in whole]


def _comparison(row: dict[str, Any]) -> Comparison:
  evidence = _parse(row["evidence"]) if row["evidence"] else {}
  return Comparison(
    **row | {"verdict": Verdict(row["verdict"]), "evidence": evidence if isinstance(evidence, dict) else {}}
  )


def _parse(text: str) -> Any:
  return json.loads(text, parse_constant=lambda name: None)  # NaN and the infinities are no numbers to show

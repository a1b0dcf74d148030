"""Which charts a report shows, and of what. A chart without a single number is left out."""

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from tsalign_jax.report import charts
from tsalign_jax.report.charts import Point, Reference, Series
from tsalign_jax.report.load import Metrics, Round
from tsalign_jax.report.words import duration

Figures = dict[str, Markup]
Rows = Mapping[int, Sequence[dict[str, float | None]]]

_CHANCE = (0.5, "50%: chance")


def verdict_bar(metrics: Metrics) -> Markup:
  """Wins, ties and losses of the aligned policy as one bar."""
  parts = [
    ("won", metrics.wins or 0, "strong"),
    ("tied", metrics.ties or 0, "quiet"),
    ("lost", metrics.losses or 0, "other"),
  ]
  return Markup(charts.split_bar("Verdicts on the held-out prompts", parts))


def outcome_figures(finished: Sequence[Round]) -> Figures:
  """Charts by round, by title: win rate, lengths, student accuracy, drift and flips."""

  def values(read: Callable[[Metrics], float | None]) -> list[list[Point]]:
    return [[(round.number, read(round.metrics)) for round in finished]]

  def student(kind: str) -> list[Series]:
    return [
      Series("student now", values(lambda metrics: getattr(metrics, kind).now)),
      Series("first student S(0)", values(lambda metrics: getattr(metrics, kind).initial), "other"),
    ]

  intervals = [round.metrics.win_rate_ci for round in finished]
  win_rate = Series("win rate", values(lambda metrics: metrics.win_rate), intervals=intervals)
  lengths = [
    Series("aligned policy", values(lambda metrics: metrics.mean_length_policy)),
    Series("base policy", values(lambda metrics: metrics.mean_length_base), "other"),
  ]
  drift = Series("KL", values(lambda metrics: metrics.kl_from_initial))
  flips = Series("reversed", values(lambda metrics: metrics.flip_rate))
  return dict(
    [
      *_by_round("Win rate against the base policy", [win_rate], True, (0.5, "50%: no difference")),
      *_by_round("Mean answer length, in tokens", lengths, from_zero=True),
      *_by_round("Student accuracy on random pairs", student("student_accuracy_random"), True, _CHANCE),
      *_by_round("Student accuracy on mined pairs", student("student_accuracy_mined"), True, _CHANCE),
      *_by_round("Drift: KL from the initial policy, in nats a response", [drift], from_zero=True),
      *_by_round("Pairs where the teacher reversed the student", [flips], True, from_zero=True),
    ]
  )


def align_figures(rounds: Sequence[Round]) -> Figures:
  """Charts by step of align, by title; the steps of all rounds in a row."""
  rows = {round.number: round.align for round in rounds if round.align}
  rewards = {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}
  logps = {"chosen": "logps/chosen", "rejected": "logps/rejected"}
  return dict(
    [
      *_by_step("Reward margins", rows, {"margin": "rewards/margins"}),
      *_by_step("Reward accuracies", rows, {"accuracy": "rewards/accuracies"}, True, _CHANCE),
      *_by_step("Rewards", rows, rewards),
      *_by_step("Log-probabilities (logps) under the policy", rows, logps),
      *_by_step("Align: loss", rows, {"loss": "loss"}),
      *_by_step("Align: gradient norm", rows, {"gradient norm": "grad_norm"}),
    ]
  )


def distil_figures(rounds: Sequence[Round]) -> Figures:
  """Charts by step of distil, by title; the steps of all rounds in a row."""
  rows = {round.number: round.distil for round in rounds if round.distil}
  accuracy = _by_step("Distil: accuracy on its batch", rows, {"accuracy": "accuracy"}, True, _CHANCE)
  return dict([*_by_step("Distil: loss", rows, {"loss": "loss"}), *accuracy])


def time_figure(finished: Sequence[Round]) -> Markup | None:
  """Bars of the time that each stage took by round; None if no time was recorded."""
  rows = {f"round {round.number}": round.metrics.seconds for round in finished if round.metrics.seconds}
  return Markup(charts.stacked_bars("Time by stage and round", rows, format=duration)) if rows else None


def _by_round(
  title: str,
  series: Sequence[Series],
  is_share: bool = False,
  reference: Reference | None = None,
  from_zero: bool = False,
) -> list[tuple[str, Markup]]:
  if not _holds_numbers(series):
    return []
  name = f"{title}, by round"
  svg = charts.by_round(name, series, is_share=is_share, from_zero=from_zero, reference=reference)
  return [(title, Markup(svg))]


def _by_step(
  title: str,
  rows: Rows,
  columns: Mapping[str, str],
  is_share: bool = False,
  reference: Reference | None = None,
) -> list[tuple[str, Markup]]:
  begins = _first_steps(rows)
  series = [
    Series(label, _segments(rows, begins, column), style)
    for (label, column), style in zip(columns.items(), ("strong", "other"), strict=False)
  ]
  if not _holds_numbers(series):
    return []
  svg = charts.by_step(f"{title}, by step", series, boundaries=begins, is_share=is_share, reference=reference)
  return [(title, Markup(svg))]


def _first_steps(rows: Rows) -> dict[int, float]:
  """How many steps came before each round; {1: 40 steps, 2: 50 steps} begin at {1: 0, 2: 40}."""
  begins, before = {}, 0.0
  for round, logged in rows.items():
    begins[round] = before
    before += logged[-1]["step"] + 1  # steps count from 0
  return begins


def _segments(rows: Rows, begins: Mapping[int, float], column: str) -> list[list[Point]]:
  return [[(begins[round] + row["step"], row.get(column)) for row in logged] for round, logged in rows.items()]


def _holds_numbers(series: Sequence[Series]) -> bool:
  return any(y is not None for line in series for segment in line.segments for _, y in segment)

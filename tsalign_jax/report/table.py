"""The table that closes a run in the terminal: one line a round."""

from pathlib import Path

from rich import box
from rich.table import Table

from tsalign_jax.report.load import Change, Metrics, Round, load_run
from tsalign_jax.report.words import MISSING, OUTCOMES, number, percent

_COLUMNS = (
  "round",
  "win rate %\n[95%]",
  "won/tied/\nlost",
  "tokens\nbase→now",
  "student\nrandom",
  "student\nmined",
  "KL\nnats",
  "min",
)


def closing_table(run: Path) -> Table:
  """Finished rounds of the run in a folder; raises UserError if it holds no run.

  80 columns are enough while counts are below 1,000.
  """
  finished = load_run(run).finished
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption_justify="left")
  table.caption = _conclusion(finished)
  for heading in _COLUMNS:
    table.add_column(heading, justify="right", no_wrap=True)
  for round in finished:
    table.add_row(str(round.number), *_cells(round.metrics))
  return table


def _cells(metrics: Metrics) -> list[str]:
  low, high = metrics.win_rate_ci
  return [
    f"{_points(metrics.win_rate)} [{_points(low)}, {_points(high)}]",
    "/".join(MISSING if count is None else str(count) for count in (metrics.wins, metrics.ties, metrics.losses)),
    f"{_whole(metrics.mean_length_base)}→{_whole(metrics.mean_length_policy)}",
    _change(metrics.student_accuracy_random),
    _change(metrics.student_accuracy_mined),
    number(metrics.kl_from_initial),
    _minutes(sum(metrics.seconds.values())),
  ]


def _conclusion(finished: list[Round]) -> str:
  if not finished:
    return "No round has finished yet."
  last = finished[-1].metrics
  sentence = OUTCOMES[last.outcome]
  if last.outcome == "same":
    sentence += ": the 95% interval includes 50%"
  others = "".join(
    f"\nBy {name}, which labelled nothing: {_points(judge.win_rate)} "
    f"[{_points(judge.win_rate_ci[0])}, {_points(judge.win_rate_ci[1])}]"
    for name, judge in last.judges.items()
  )
  undecided = f", {last.undecided} more undecided" if last.undecided else ""
  prompts = f"on {_whole(last.heldout_prompts)} held-out prompts"
  return f"{sentence} ({last.judged} comparisons {prompts}{undecided}).{others}"


def _change(values: Change) -> str:
  return f"{_points(values.initial, 0)}→{_points(values.now, 0)}"


def _minutes(seconds: float) -> str:
  return f"{seconds / 60:.{1 if seconds < 6000 else 0}f}"


def _points(value: float | None, digits: int = 1) -> str:
  return percent(value, digits).rstrip("%")


def _whole(value: float | None) -> str:
  return MISSING if value is None else f"{value:.0f}"

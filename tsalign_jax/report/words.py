"""How the reports put numbers and outcomes into words. A missing number reads as a dash."""

from collections import Counter
from collections.abc import Sequence

from tsalign_jax.report.load import Change, Comparison, Metrics, Round, Run
from tsalign_jax.types import Verdict

MISSING = "–"
OUTCOMES = {
  "better": "The aligned policy beats the base policy",
  "worse": "The aligned policy loses to the base policy",
  "same": "No measurable difference from the base policy",
  "unknown": "The comparison with the base policy gave no number",
}
VERDICTS = {
  Verdict.FIRST: "aligned better",
  Verdict.TIE: "tie",
  Verdict.SECOND: "base better",
  Verdict.INCONSISTENT: "inconsistent",
  Verdict.ERROR: "not judged",
}


def percent(value: float | None, digits: int = 1) -> str:
  """A share as a percentage: 0.613 is 61.3%."""
  return MISSING if value is None else f"{100 * value:.{digits}f}%"


def number(value: float | None) -> str:
  """About three significant digits, thousands apart, and no finer than a thousandth: 0.031, 4.56, 78.9, 1,234."""
  if value is None:
    return MISSING
  if value == int(value) or abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:z.{1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3}f}"


def duration(seconds: float | None) -> str:
  """42 s, 3.5 min or 2 h 05 min."""
  if seconds is None:
    return MISSING
  if seconds < 59.5:
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"
  if seconds < 3570:
    return f"{seconds / 60:.1f} min"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02d} min"


def change(values: Change) -> str:
  """A share then and now: 61% → 75%."""
  return f"{percent(values.initial, 0)} → {percent(values.now, 0)}"


def proportions(sample: Sequence[Comparison], whole: Sequence[Comparison]) -> str:
  """What a sample holds of each verdict: aligned better 6 of 61, tie 1 of 12, base better 3 of 27."""
  taken, total = (Counter(item.verdict for item in items) for items in (sample, whole))
  named = [(name, taken[verdict], total[verdict]) for verdict, name in VERDICTS.items() if total[verdict]]
  return ", ".join(f"{name} {some} of {every}" for name, some, every in named)


def never_used(metrics: Metrics) -> str:
  """Prompts that were dropped before the first round: 3 training prompts (longer than 256 tokens)."""
  return ", ".join(
    f"{count:,} {split} {'prompt' if count == 1 else 'prompts'} ({reason})"
    for split, reasons in metrics.prompts_dropped.items()
    for reason, count in reasons.items()
  )


def caveats(run: Run, comparisons: Sequence[Comparison]) -> list[str]:
  """What a careful reader should hold against the headline of a run with a finished round, gravest first."""
  last = run.finished[-1]
  found = [
    _interval_caveat(last.metrics),
    _unfinished_caveat(run),
    _length_caveat(last.metrics),
    _unjudged_caveat(comparisons),
    _undecided_caveat(last.metrics),
    _cut_caveat(last.metrics),
    _best_round_caveat(run.finished),
    _judge_caveat(last.metrics),
    "The interval covers the choice of prompts, not the luck of one training run: another seed may differ.",
  ]
  return [caveat for caveat in found if caveat]


def _judge_caveat(metrics: Metrics) -> str:
  labelled = "The teacher that judged these answers also labelled the training pairs: a win means that this teacher is "
  if not metrics.judges:
    return labelled + "pleased more often, which people or another judge may not share."
  found = ", ".join(f"{percent(judge.win_rate)} by {name}" for name, judge in metrics.judges.items())
  return labelled + f"pleased more often. By judges that labelled nothing: {found}."


def _interval_caveat(metrics: Metrics) -> str | None:
  if metrics.outcome != "same":
    return None
  low, high = metrics.win_rate_ci
  return (
    f"The 95% interval, {percent(low)} to {percent(high)}, includes 50%: these prompts cannot tell the two "
    "policies apart. More held-out prompts would narrow it."
  )


def _unfinished_caveat(run: Run) -> str | None:
  done, planned = len(run.finished), run.setting("rounds")
  return f"The run is not finished: {done} of {planned} rounds are." if planned and done < planned else None


def _length_caveat(metrics: Metrics) -> str | None:
  base, policy = metrics.mean_length_base, metrics.mean_length_policy
  if not base or policy is None:
    return None
  means = f"{number(policy)} tokens against {number(base)} of the base"
  shift = policy / base - 1
  if abs(shift) < 0.05:
    return f"Answers are about as long as before: {means} on average."
  how = f"{percent(abs(shift), 0)} {'longer' if shift > 0 else 'shorter'}"
  return f"Answers are {how}: {means} on average. Part of the outcome may be a preference for length."


def _unjudged_caveat(comparisons: Sequence[Comparison]) -> str | None:
  parts = {
    "inconsistent (the teacher changed its mind with the order)": Verdict.INCONSISTENT,
    "not judged (the teacher failed)": Verdict.ERROR,
  }
  counts = {name: sum(item.verdict == verdict for item in comparisons) for name, verdict in parts.items()}
  named = [f"{count} {name}" for name, count in counts.items() if count]
  return f"Of {len(comparisons)} comparisons, {' and '.join(named)}." if named else None


def _undecided_caveat(metrics: Metrics) -> str | None:
  named = [f"{name} left {judge.undecided} undecided" for name, judge in metrics.judges.items() if judge.undecided]
  return f"Further judges did not decide every comparison: {', '.join(named)}." if named else None


def _cut_caveat(metrics: Metrics) -> str | None:
  if not metrics.student_cut:
    return None
  return (
    f"The student scored {metrics.student_cut:,} of {metrics.student_scored:,} responses of the last round without the "
    "start of their prompt, or also their own end, as they are longer than student.max_tokens or its positions."
  )


def _best_round_caveat(finished: Sequence[Round]) -> str | None:
  rated = [round for round in finished if round.metrics.win_rate is not None]
  if not rated:
    return None
  best = max(rated, key=lambda round: round.metrics.win_rate)
  if best.metrics.win_rate <= (finished[-1].metrics.win_rate or 0):
    return None
  return (
    f"The headline is the last round. Round {best.number} scored higher ({percent(best.metrics.win_rate)}), but "
    "the best of several looks at the same prompts flatters."
  )

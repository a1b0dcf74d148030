"""The report of a run: one HTML page that loads nothing, to decide whether to trust the run."""

import os
from pathlib import Path

import jinja2

from tsalign_jax.report import figures, words
from tsalign_jax.report.answers import fair_sample
from tsalign_jax.report.load import Run, load_comparisons, load_run

_SAMPLE_SIZE = 10


def write_report(run: Path) -> Path:
  """Writes `report.html` into the folder of a run, finished or not, and returns its path.

  Raises UserError if the folder holds no run.
  """
  target = Path(run) / "report.html"
  partial = target.with_name("report.html.tmp")
  partial.write_text(render(load_run(run)), encoding="utf-8")
  os.replace(partial, target)
  return target


def render(run: Run) -> str:
  """The page about a run, as HTML."""
  finished = run.finished
  comparisons = load_comparisons(finished[-1]) if finished else []
  sample = fair_sample(comparisons, _SAMPLE_SIZE)
  return _template().render(
    run=run,
    last=finished[-1] if finished else None,
    caveats=words.caveats(run, comparisons) if finished else [],
    verdict_bar=figures.verdict_bar(finished[-1].metrics) if finished else None,
    outcome_figures=figures.outcome_figures(finished),
    align_figures=figures.align_figures(run.rounds),
    distil_figures=figures.distil_figures(run.rounds),
    time_figure=figures.time_figure(finished),
    never_used=words.never_used(finished[-1].metrics) if finished else "",
    reasons=list(dict.fromkeys(reason for round in finished for reason in round.metrics.dropped)),
    stages=list(dict.fromkeys(stage for round in finished for stage in round.metrics.seconds)),
    comparisons=comparisons,
    sample=sample,
    proportions=words.proportions(sample, comparisons),
  )


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("tsalign_jax", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {name: getattr(words, name) for name in ("percent", "number", "duration", "change")}
  environment.globals |= {"OUTCOMES": words.OUTCOMES, "VERDICTS": words.VERDICTS, "MISSING": words.MISSING}
  return environment.get_template("report.html.jinja")

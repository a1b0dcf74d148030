"""Tune each side, then let the sides take turns."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.terminal import note, number, print_machine, print_results, print_tries, written
from benchmarks.workers import Worker, WorkerError
from tsalign_jax.types import UserError

OURS = "tsalign_jax"
Settings = Mapping[str, Any]
Facts = Mapping[str, Any]  # about the work, as each side found it
Runs = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Side:
  """A contender: its name, its class as "module:Class", and the settings of which it may use its best."""

  name: str
  program: str
  candidates: Sequence[Settings] = ({},)
  python: str = sys.executable
  hide: tuple[str, ...] = ()

  def start(self, work: dict, settings: Settings, cache: Path) -> Worker:
    """A new process with this contender in it."""
    log = cache / "logs" / f"{self.name}.log"
    return Worker(self.program, work, dict(settings), python=self.python, hide=self.hide, log=log)


def ours(contender: str, candidates: Sequence[Settings] = ({},)) -> Side:
  """Our side, as on a machine without PyTorch: transformers would load it only because the peers are installed."""
  return Side(OURS, f"benchmarks.ours:{contender}", candidates, hide=("torch",))


def making_up(size: int, candidates: Sequence[Settings]) -> list[Settings]:
  """Those whose batches make up a step of so many pairs; the others would take steps of another size than we do."""
  found = [settings for settings in candidates if size % min(settings["batch"], size) == 0]
  if not found:
    raise UserError(f"--batch-size: {size} is a multiple of none of the peer's {[s['batch'] for s in candidates]}")
  return found


def contest(
  title: str,
  sides: Sequence[Side],
  work: dict,
  options: argparse.Namespace,
  *,
  unit: str,
  agree: Callable[[Facts, Facts], str] | None = None,
  eligible: Callable[[Settings], bool] = lambda settings: True,
) -> dict[str, Runs]:
  """The timed runs of each side by its name, ours first; a table of them is printed too.

  Each side first tries its candidate settings, in a process of its own each; the fastest eligible one takes part.
  `agree` compares the facts of our side with those of a peer: a sentence, or a UserError where the work differed. Runs
  that count their responses must all have as many.
  """
  chosen = [_best(title, side, work, options, unit, eligible) for side in sides]
  lines = []
  with ExitStack() as stack:
    workers, facts = {}, {}
    for side, settings in zip(sides, chosen, strict=True):
      note(f"{title}: {side.name} warms up with {written(settings)}")
      workers[side.name] = stack.enter_context(side.start(work, settings, options.cache))
      facts[side.name] = workers[side.name].ready()  # one after the other, so that no warm-up meets another
      versions = ", ".join(f"{name} {version}" for name, version in facts[side.name]["versions"].items())
      lines.append(f"{side.name}: {written(settings)} ({versions})")
    if agree:
      lines += [agree(facts[OURS]["check"], facts[side.name]["check"]) for side in sides if side.name != OURS]
    results = {name: [] for name in workers}
    for seed in range(1, options.runs + 1):
      note(f"{title}: run {seed} of {options.runs}")
      for name, worker in workers.items():
        results[name].append(worker.run(seed, twice=True))  # a process that has slept works slower at first
  counts = {name: {run["responses"] for run in runs if "responses" in run} for name, runs in results.items()}
  if len(set().union(*counts.values())) > 1:
    raise UserError(f"the sides did not do the same work: responses in their runs {counts}")
  print_results(f"{title}: medians of {options.runs} runs each, taking turns", unit, results)
  for line in lines:
    note(line)
  print_machine()
  return results


def rate(runs: Runs) -> float:
  """Units of work a second: the median over the runs."""
  return median(run["units"] / run["seconds"] for run in runs)


def ratio(results: Mapping[str, Runs], peer: str, of: Callable[[Runs], float] = rate) -> float:
  """Ours divided by the peer's."""
  return round(of(results[OURS]) / of(results[peer]), 3)


def _best(title: str, side: Side, work: dict, options, unit: str, eligible: Callable[[Settings], bool]) -> Settings:
  """The fastest eligible settings of a side."""
  if len(side.candidates) == 1 or options.no_tuning:
    return side.candidates[0]
  rates, rows = {}, []
  for index, settings in enumerate(side.candidates):
    note(f"{title}: {side.name} tries {written(settings)}")
    try:
      with side.start(work, settings, options.cache) as worker:
        worker.ready()
        run = worker.run(0)
    except WorkerError as error:  # settings that this machine cannot run are no candidates
      rows.append((settings, "fails", str(error)[:80]))
      continue
    speed = rate([run])
    if eligible(settings):
      rates[index] = speed
    mark = "" if eligible(settings) else " (not eligible)"
    rows.append((settings, number(speed) + mark, f"{run['peak_gib']:.2f}"))
  print_tries(f"{title}: what {side.name} tried", unit, rows)
  if not rates:
    raise UserError(f"{side.name}: none of its settings runs here; see {options.cache / 'logs'}")
  return side.candidates[max(rates, key=rates.get)]

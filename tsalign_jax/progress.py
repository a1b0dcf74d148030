"""Progress of a run in the terminal: one line a stage, with speed and time left while it runs."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
LOG_WIDTH = 120  # columns where neither a terminal nor the user says how many
SILENCE = 60  # seconds between two lines of a stage where no bar can be drawn


def width() -> int | None:
  """Columns of a console: None to ask the terminal or the variable `COLUMNS`, enough for every table in a log."""
  return None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


def terminal_progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Callable[[str], Callable]:
  """For each stage, its display: a live bar in a terminal, a line a minute in a log, one closing line everywhere."""

  say = functools.partial(console.print, highlight=False, soft_wrap=True)

  def of_stage(stage: str):
    @contextlib.contextmanager
    def display(total: int, unit: str) -> Iterator[Advance]:
      started = spoken = clock()
      before, last = 0.0, ""
      drawn = console.is_terminal or console.is_jupyter
      with Progress(*_columns(unit), console=console, transient=True, disable=not drawn) as bar:
        task = bar.add_task(stage, total=total, note="", rate="")

        def advance(amount: float, note: str = "", *, earlier: bool = False) -> None:
          """So much more is done; what an earlier attempt did is, too, but says nothing of the speed."""
          nonlocal last, spoken, before
          last, now = note or last, clock()
          done = bar.tasks[0].completed + amount
          if earlier:
            before += amount
            bar.reset(task, completed=done)
          else:
            bar.advance(task, amount)
          rate = f"{(done - before) / max(now - started, 1e-9):.1f} {unit}/s"
          bar.update(task, note=last, rate=rate)
          if not drawn and now - spoken >= SILENCE:
            say(f"  {stage:20} {done:>7.0f} of {total} {unit}  {rate}  {last}")
            spoken = now

        yield advance
      seconds = clock() - started
      say(f"[green]✓[/] {stage:20} {total:>7} {unit:<10} {seconds:7.1f} s  [dim]{last}[/]")

    return display

  return of_stage


def _columns(unit: str):
  return (
    TextColumn("{task.description:20}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TextColumn(f"{unit}  {{task.fields[rate]}}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("[dim]{task.fields[note]}"),
  )

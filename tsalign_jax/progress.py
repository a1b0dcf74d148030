"""Progress of a run in the terminal: one line a stage, with speed and time left while it runs."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float, str], None]


def terminal_progress(console: Console) -> Callable[[str], Callable]:
  """For each stage, its display: a live bar in a terminal, one closing line everywhere."""

  def of_stage(stage: str):
    @contextlib.contextmanager
    def display(total: int, unit: str) -> Iterator[Advance]:
      started, last = time.monotonic(), ""
      with Progress(*_columns(unit), console=console, transient=True) as bar:
        task = bar.add_task(stage, total=total, note="", rate="")

        def advance(amount: float, note: str = "") -> None:
          nonlocal last
          last = note or last
          bar.advance(task, amount)
          done = bar.tasks[0].completed
          rate = f"{done / max(time.monotonic() - started, 1e-9):.1f} {unit}/s"
          bar.update(task, note=last, rate=rate)

        yield advance
      seconds = time.monotonic() - started
      console.print(f"[green]✓[/] {stage:20} {total:>7} {unit:<10} {seconds:7.1f} s  [dim]{last}[/]", highlight=False)

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

"""What a benchmark reads from the command line and prints."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.workers import WorkerError
from tsalign_jax.progress import width
from tsalign_jax.types import UserError

console = Console(width=width(), soft_wrap=True, highlight=False)


def parser(description: str) -> argparse.ArgumentParser:
  """The options that every benchmark has."""
  out = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  out.add_argument("--policy", type=Path, default=Path("models/smollm2"), help="language model, a Hugging Face folder")
  out.add_argument("--cache", type=Path, default=Path("models/bench"), help="for what the benchmarks make themselves")
  out.add_argument("--runs", type=_count, default=5, help="timed runs, of each side where there are several")
  return out


def _count(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
  return int(text)


def add_tuning(out: argparse.ArgumentParser) -> None:
  """For benchmarks of several sides."""
  out.add_argument("--no-tuning", action="store_true", help="take each side's first settings instead of its best")


def add_prompts(out: argparse.ArgumentParser) -> None:
  """For benchmarks that sample."""
  out.add_argument("--prompts", help="prompts in TRL's format; without it, generated ones")


def add_pairs(out: argparse.ArgumentParser) -> None:
  """For benchmarks of given responses."""
  out.add_argument("--pairs", help="preference pairs in TRL's format; without it, sampled ones")


def command(main: Callable[[], Mapping[str, float]]) -> None:
  """Runs a benchmark and ends with its ratios in one line of JSON; an error is one sentence and exit code 2."""
  try:
    ratios = main()
  except (UserError, WorkerError) as error:
    console.print(f"[bold red]error:[/] {escape(str(error))}")
    sys.exit(2)
  print(json.dumps(ratios))


def note(text: str) -> None:
  """One line about what is going on."""
  console.print(f"[dim]{escape(text)}[/]")


def print_tries(title: str, unit: str, rows: Sequence[tuple[Mapping[str, Any], str, str]]) -> None:
  """The settings that a side tried, with its speed and peak memory."""
  table = Table("settings", unit, "peak GiB", title=title, title_justify="left")
  for settings, rate, peak in rows:
    table.add_row(written(settings), rate, escape(peak))
  console.print(table)


def print_results(title: str, unit: str, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """A table with the medians of each side's runs; the first side is ours."""
  rates = {name: [run["units"] / run["seconds"] for run in runs] for name, runs in sides.items()}
  every = [run for runs in sides.values() for run in runs]
  extras = [key for key in every[0] if key not in ("seconds", "units", "compiling")]
  if any(run["compiling"] for run in every):
    extras.append("compiling")
  table = Table(title=title, title_justify="left")
  for index, heading in enumerate(("", unit, "slowest", "fastest", "ours is", *extras)):
    table.add_column(_words(heading), justify="right" if index else "left")
  ours = median(next(iter(rates.values())))
  for name, runs in sides.items():
    speed = (median(rates[name]), min(rates[name]), max(rates[name]))
    others = (f"{median([run[key] for run in runs]):,.2f}" for key in extras)
    table.add_row(name, *map(number, speed), f"{ours / speed[0]:.2f} x", *others)
  console.print(table)


def print_machine() -> None:
  """What it was measured on."""
  note(f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}")


def number(value: float) -> str:
  """At least three digits of a speed."""
  return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def written(values: Mapping[str, Any]) -> str:
  """A mapping in words: "batch 8, attention sdpa"."""
  return _words(", ".join(f"{key} {value}" for key, value in values.items()))


def _words(text: str) -> str:
  return text.replace("_gib", " GiB").replace("_", " ")


def _processor() -> str:
  file = Path("/proc/cpuinfo")
  lines = file.read_text().splitlines() if file.is_file() else []
  return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""What `tsalign train-reward` shows in the end: the model's accuracy on held-out pairs, and what it learned from."""

import json
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table

from tsalign_jax.report.words import percent


def reward_summary(run: Path) -> Group:
  """Accuracies with their 95% intervals, and below them every pair that was not used as it is."""
  metrics = json.loads((run / "metrics.json").read_text())
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
  headings = (f"{metrics['heldout_pairs']:,} held-out pairs", "left"), ("accuracy", "right"), ("95% interval", "right")
  for heading, justify in headings:
    table.add_column(heading, justify=justify, no_wrap=True)
  for name, key in (("reward model", "accuracy"), ("longer wins", "longer_wins")):
    low, high = metrics[f"{key}_ci"]
    table.add_row(name, percent(metrics[key]), f"{percent(low)} to {percent(high)}")
  return Group(table, _notes(metrics))


def _notes(metrics: dict) -> str:
  notes = [f"Trained on {metrics['train_pairs']:,} pairs."]
  notes += [f"Dropped: {count:,} ({reason})." for reason, count in metrics["dropped"].items()]
  if metrics["heldout_cut"]:
    notes.append(f"Held-out pairs of which the model did not read everything: {metrics['heldout_cut']:,}.")
  if metrics["heldout_equal"]:
    notes.append(f"Held-out pairs of equal responses, left out: {metrics['heldout_equal']:,}.")
  return " ".join(notes)

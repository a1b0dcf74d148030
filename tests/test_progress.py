"""Tests of what a stage shows of its progress where no bar can be drawn."""

import io
import sys
import types

import pytest
from rich.console import Console

from tsalign_jax.progress import LOG_WIDTH, SILENCE, terminal_progress, width


def shown(seconds: list[float]) -> list[str]:
  """Lines of a log after so many seconds between one response and the next."""
  now, out = [0.0], io.StringIO()
  console = Console(file=out, force_terminal=False, width=60)
  with terminal_progress(console, lambda: now[0])("round_01/sample")(8, "responses") as advance:
    for passed in seconds:
      now[0] += passed
      advance(1, "2 harvested")
  return out.getvalue().splitlines()


def test_a_log_gets_a_line_a_minute_and_one_at_the_end():
  lines = shown([SILENCE / 4] * 8)
  assert len(lines) == 3
  assert lines[0].split() == ["round_01/sample", "4", "of", "8", "responses", "0.1", "responses/s", "2", "harvested"]
  assert lines[-1].startswith("✓ round_01/sample")


def test_what_an_earlier_attempt_did_is_done_and_says_nothing_of_the_speed():
  now, out = [0.0], io.StringIO()
  console = Console(file=out, force_terminal=False, width=60)
  with terminal_progress(console, lambda: now[0])("round_01/align")(100, "steps") as advance:
    advance(60, earlier=True)
    now[0] = float(SILENCE)
    advance(6)
  assert out.getvalue().split()[:7] == ["round_01/align", "66", "of", "100", "steps", "0.1", "steps/s"]


def test_a_stage_of_a_few_seconds_is_one_line():
  assert len(shown([1.0] * 8)) == 1


@pytest.mark.parametrize(
  ("terminal", "columns", "expected"), [(True, None, None), (False, None, LOG_WIDTH), (False, "200", None)]
)
def test_tables_in_logs_are_wide_unless_the_user_says_how_wide(terminal, columns, expected, monkeypatch):
  monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: terminal))
  monkeypatch.delenv("COLUMNS", raising=False)
  if columns:
    monkeypatch.setenv("COLUMNS", columns)
  assert width() == expected

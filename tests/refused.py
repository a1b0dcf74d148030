"""What a person is told of a mistake."""

import subprocess


def expect_error(result: subprocess.CompletedProcess, *parts: str) -> None:
  """Exit code 2 and one sentence, with all of these in it."""
  assert result.returncode == 2, result.stderr
  (line,) = [line for line in result.stderr.splitlines() if line.strip()]
  assert line.startswith("error: ")
  for part in parts:
    assert part in line

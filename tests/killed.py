"""A command that kills itself: `python killed.py STAGE AMOUNT COMMAND CONFIG...` runs `tsalign COMMAND CONFIG...`.

It is gone, as by SIGKILL from outside, when so much of the stage is done; with 0, when the stage begins.
"""

import contextlib
import os
import signal
import sys

from tsalign_jax import cli, progress


def killing_at(stage: str, amount: float):
  """Displays of which that of one stage ends the process."""

  def kill_if(name: str, done: float) -> None:
    if name == stage and done >= amount:
      os.kill(os.getpid(), signal.SIGKILL)

  def progress_of(name):
    kill_if(name, 0)

    @contextlib.contextmanager
    def display(total, unit):
      done = 0.0

      def advance(more, note="", *, earlier=False):
        nonlocal done
        done += more
        kill_if(name, done)

      yield advance

    return display

  return progress_of


if __name__ == "__main__":
  stage, amount, *arguments = sys.argv[1:]
  progress.terminal_progress = lambda console: killing_at(stage, float(amount))
  sys.argv = ["tsalign", *arguments]
  cli.main()

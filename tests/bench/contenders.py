"""Contenders that need nothing: what the tests of the workers start."""

import time


class Counting:
  """Works for a moment, and says what it was given; fails to warm up where the settings say so."""

  packages = ("pytest",)

  def __init__(self, work, settings):
    if settings.get("broken"):
      raise ValueError("no such batch size")
    self.check, self.runs = {"work": work, "settings": settings}, 0
    self.responses = settings.get("responses", 4)
    if settings.get("look_for_torch"):
      self.check["torch"] = _has_torch()
    print("a library that prints")

  def run(self, seed):
    """One unit for each of the work."""
    time.sleep(0.01)
    self.runs += 1
    return {"units": 3, "seed": seed, "runs": self.runs, "responses": self.responses}


class Compiling:
  """Compiles a program for each new seed, and works for a moment besides."""

  packages = ("jax",)

  def __init__(self, work, settings):
    import jax

    self.program = jax.jit(lambda x: x + 1)

  def run(self, seed):
    """One unit, of an array of a length of its own."""
    import numpy as np

    time.sleep(0.01)
    return {"units": float(self.program(np.ones(seed)).shape[0])}


def _has_torch() -> bool:
  try:
    import torch  # noqa: F401
  except ImportError:
    return False
  return True

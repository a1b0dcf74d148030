"""Each contender in a process of its own, stopped while another has its turn.

torch and JAX must not share threads or memory, and a contender may need another Python environment altogether, so
the parent talks to its workers in lines of JSON and this module needs nothing but the standard library.
"""

import importlib
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}  # unless another is named: one side would use all of them
ENVIRONMENT = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as `tsalign` starts itself; for all sides alike
  "HF_HUB_OFFLINE": "1",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  "TRANSFORMERS_VERBOSITY": "error",
  "TRL_EXPERIMENTAL_SILENCE": "1",
  "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several workers share one GPU
}


class Contender(Protocol):
  """One side of a benchmark: it loads and warms up when it is made, from the work and its own settings."""

  packages: Sequence[str]  # whose versions are recorded
  check: Mapping[str, Any] = {}  # facts about the work, to be compared with the other side's

  def run(self, seed: int) -> dict[str, Any]:
    """Does all the work once; `units` says how much it was, other numbers go into the table."""
    ...


class WorkerError(Exception):
  """A worker that ended: its name, and the end of what it printed."""


class Worker:
  """A contender in its own process, as the parent sees it; leaving the context ends the process."""

  def __init__(self, program: str, work: dict, settings: dict, *, python: str, hide: Sequence[str], log: Path):
    self.program, self.log = program, log
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = ONE_GPU | os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as errors:
      self.process = subprocess.Popen(
        [python, "-m", "benchmarks.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        text=True,
      )
    self._send({"program": program, "work": work, "settings": settings, "hide": list(hide)})

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *_) -> None:
    self.process.kill()  # works on a stopped process too
    self.process.wait()

  def ready(self) -> dict[str, Any]:
    """What the contender says about itself once it is loaded and warm: `check` and `versions`. It sleeps then."""
    return self._answer()

  def run(self, seed: int, *, twice: bool = False) -> dict[str, Any]:
    """A timed run: its `seconds`, `compiling`, `peak_gib` so far, and what the contender returns.

    It is done again, and the second one counts, where the first one compiles, or if `twice`; `compiling` is by how much
    a run that compiles took longer.
    """
    self.process.send_signal(signal.SIGCONT)
    self._send({"seed": seed, "twice": twice})
    return self._answer()

  def _send(self, message: dict) -> None:
    try:
      self.process.stdin.write(json.dumps(message) + "\n")
      self.process.stdin.flush()
    except BrokenPipeError as error:
      raise self._failure() from error

  def _answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise self._failure()
    self.process.send_signal(signal.SIGSTOP)
    return json.loads(line)

  def _failure(self) -> WorkerError:
    self.process.kill()
    code = self.process.wait()
    last = (self.log.read_text(errors="replace").strip() or f"exit code {code}").splitlines()[-1]
    return WorkerError(f"{self.program}: {last} (see {self.log})")


def main() -> None:
  """The worker's end: makes the contender that the first line names, then answers each further line with a run."""
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print goes to the log

  def reply(**message) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()

  job = json.loads(sys.stdin.readline())
  for name in job["hide"]:
    sys.modules[name] = None  # as on a machine where it is not installed
  module, _, name = job["program"].partition(":")
  contender = getattr(importlib.import_module(module), name)(job["work"], job["settings"])
  versions = {package: importlib.metadata.version(package) for package in contender.packages}
  compiled = _compiled_programs()
  reply(check=getattr(contender, "check", {}), versions=versions)
  for line in sys.stdin:
    asked, before = json.loads(line), len(compiled)
    seconds, out = _timed(contender, asked["seed"])
    compiling, compiles = 0.0, len(compiled) > before
    if compiles or asked["twice"]:
      again, out = _timed(contender, asked["seed"])
      seconds, compiling = again, max(0.0, seconds - again) if compiles else 0.0
    reply(seconds=seconds, compiling=compiling, peak_gib=peak_bytes() / 2**30, **out)


def _timed(contender: Contender, seed: int) -> tuple[float, dict[str, Any]]:
  start = time.perf_counter()
  out = contender.run(seed)
  return time.perf_counter() - start, out


def peak_bytes() -> int:
  """The most memory this process has held so far: of its GPU where it uses one, else of the machine."""
  torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
  if torch and torch.cuda.is_available():
    return torch.cuda.max_memory_allocated()
  if jax and jax.default_backend() != "cpu":
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
  status = Path("/proc/self/status")
  if status.is_file():  # unlike ru_maxrss, without what the parent held when it started this process
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compiled_programs() -> list[str]:
  """A list that grows by an entry with each program that XLA compiles from now on."""
  programs: list[str] = []
  if "jax" in sys.modules:

    def add(event: str, _: float, **about) -> None:
      if event.endswith("backend_compile_duration"):
        programs.append(event)

    sys.modules["jax"].monitoring.register_event_duration_secs_listener(add)
  return programs


if __name__ == "__main__":
  main()

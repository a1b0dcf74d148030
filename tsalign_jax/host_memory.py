"""How this process takes memory from the system, and gives it back: settings of the C library on Linux."""

import ctypes
import gc
import os
import sys

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event of JAX
LONG = 1.0  # seconds; what took less to compile left little behind


def use_huge_pages() -> None:
  """Starts this process anew with huge pages for large arrays, unless the user has tuned the C library already.

  On CPUs, XLA allocates the temporary arrays of a program whenever it runs. With pages of 4 KiB a training step spends
  a third of its time on the first touch of each; and the C library reads this setting only as it starts.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
  """Gives memory that was freed back to the system.

  Else the C library keeps it, in pieces between others that are in use: compiling a training step for a CPU leaves two
  gigabytes of them, and a run that compiles in each round grows without end.
  """
  gc.collect()
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others give back by themselves
    if trim:
      trim(0)


def give_back_after_compiling(event: str, seconds: float, **_) -> None:
  """A listener for `jax.monitoring`: what a long compilation freed is given back before the program runs.

  Else that memory comes on top of what the program needs, and so counts in the process's peak.
  """
  if event == COMPILED and seconds > LONG:
    give_back()

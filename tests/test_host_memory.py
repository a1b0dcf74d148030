"""Memory that was freed is the system's again."""

import sys
from pathlib import Path

import pytest

from tsalign_jax.host_memory import give_back


def resident() -> int:
  """Bytes of memory that this process holds."""
  return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_freed_between_pieces_in_use_is_given_back():
  pieces = [bytearray(40_000) for _ in range(5_000)]  # 200 MB, in pieces too small for pages of their own
  del pieces[:-1]  # what the last one stands on is freed, and kept
  before = resident()
  give_back()
  assert before - resident() > 100e6

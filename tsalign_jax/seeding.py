"""Seeds that are derived: from the configuration's seed and the names or indices of what is random."""

import hashlib


def derived_seed(*parts: str | int) -> int:
  """A number below 2**31 that depends on all the parts and on nothing else."""
  digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1

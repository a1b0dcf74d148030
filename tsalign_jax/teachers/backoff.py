"""How long to wait before a request is sent again: pure functions of what is known."""

import email.utils
from collections.abc import Mapping
from random import Random

from tsalign_jax.seeding import derived_seed


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
  """Seconds that a server asks to wait, from Retry-After (seconds or a date); None if it does not say."""
  value = headers.get("retry-after", "")
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
      return None
  return max(0.0, seconds) if seconds == seconds else None  # "nan" is a float, too


def delay(base: float, longest: float, retry: int, asked: float | None, key: str) -> float:
  """Seconds before the n-th retry (from 1) of the request `key`: base, twice that, ..., each shortened by up to half.

  The jitter is derived from the request, so that requests that failed together come back apart and a run repeats
  itself. A server that asked for a time gets at least that, and the jitter of the first retry on top.
  """
  jitter = Random(derived_seed("backoff", key, retry)).uniform(0.5, 1.0)
  own = base if asked is not None else base * 2.0 ** min(retry - 1, 16)
  return (asked or 0.0) + min(own, longest) * jitter

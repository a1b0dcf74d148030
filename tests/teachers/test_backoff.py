"""How long to wait: exponential, jittered by what is asked and not by luck, and never less than the server asks."""

from email.utils import formatdate

import pytest

from tsalign_jax.teachers.backoff import delay, retry_after

ASKED = {
  "7": 7.0,
  "0.5": 0.5,
  "-3": 0.0,
  formatdate(1000.0 + 42, usegmt=True): 42.0,
  formatdate(1000.0 - 42, usegmt=True): 0.0,
  "inf": float("inf"),
  "nan": None,
  "soon": None,
  "": None,
  "Mon, 99 Foo 9999 99:99:99 GMT": None,
}


@pytest.mark.parametrize("value", ASKED)
def test_retry_after_is_read_as_seconds_or_as_a_date(value):
  assert retry_after({"retry-after": value}, 1000.0) == ASKED[value]


def test_a_server_that_does_not_say_asks_for_nothing():
  assert retry_after({}, 1000.0) is None


def test_waits_double_up_to_the_longest_and_are_shortened_by_up_to_half():
  for retry in range(1, 12):
    whole = min(2 ** (retry - 1), 60)
    assert all(0.5 * whole <= delay(1.0, 60.0, retry, None, key) <= whole for key in "abcdef")


def test_server_that_asks_for_a_time_gets_at_least_that():
  assert all(7.5 <= delay(1.0, 60.0, retry, 7.0, key) <= 8.0 for retry in range(1, 9) for key in "abcdef")


@pytest.mark.parametrize("retry", [1, 2, 9])
@pytest.mark.parametrize("asked", [None, 0.0, 7.0])
def test_jitter_parts_requests_and_repeats_itself(retry, asked):
  waits = [delay(1.0, 60.0, retry, asked, str(key)) for key in range(100)]
  assert len(set(waits)) == 100 and waits == [delay(1.0, 60.0, retry, asked, str(key)) for key in range(100)]

"""The speed of a part of a stage."""

from tsalign_jax.stages.base import Pace


def test_only_the_timed_work_counts():
  times = iter([10.0, 12.0, 50.0, 53.0])
  pace = Pace(lambda: next(times))
  assert pace.per_second is None
  with pace.of(4):
    pass
  with pace.of(6):
    pass
  assert pace.per_second == 2.0

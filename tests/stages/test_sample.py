"""Which prompts a stage takes."""

from tsalign_jax.stages.sample import take


def rows(*ids):
  return [{"prompt_id": i} for i in ids]


def ids(taken):
  return [row["prompt_id"] for row in taken]


def test_rounds_take_different_prompts_until_all_were_taken():
  everything = rows(*range(10))
  first, second, third = (ids(take(everything, 0, 2, 4 * n, 4)) for n in range(3))
  reserved = ids(take(everything, 0, 0, 0, 2))
  assert sorted(reserved + first + second) == list(range(10))
  assert third == first


def test_all_prompts_but_the_reserved_ones_are_taken_without_a_count():
  assert len(take(rows(*range(10)), 0, 3, 0, None)) == 7


def test_a_prompt_more_does_not_change_the_order_of_the_others():
  before, after = ids(take(rows(*range(10)), 0, 0, 0, None)), ids(take(rows(*range(11)), 0, 0, 0, None))
  assert [i for i in after if i != 10] == before


def test_the_order_depends_on_the_seed():
  assert ids(take(rows(*range(10)), 0, 0, 0, None)) != ids(take(rows(*range(10)), 1, 0, 0, None))

"""Generated prompts: reproducible, split cleanly, and telling the policy just what the checks verify."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsalign_jax.demo_prompts import (
  INSTRUCTIONS,
  activities,
  combinations,
  generate,
)
from tsalign_jax.teachers.checks import failed, validate
from tsalign_jax.types import UserError

TRAIN, HELDOUT = generate(1500, 300, seed=0)
ALL_ACTIVITIES = activities(heldout=False) + activities(heldout=True)


def text(row: dict) -> str:
  return row["prompt"][0]["content"]


def kinds(row: dict) -> frozenset[str]:
  return frozenset(check["name"] for check in row["checks"])


def topics(rows: list[dict]) -> set[str]:
  return {activity.name for row in rows for activity in ALL_ACTIVITIES if activity.name in text(row)}


@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=10)
def test_row_depends_on_the_seed_and_its_index_only(seed, fewer, more, heldout):
  short, _ = generate(fewer, heldout, seed)
  long, heldout_rows = generate(fewer + more, heldout + more, seed)
  assert long[:fewer] == short
  assert generate(0, heldout, seed)[1] == heldout_rows[:heldout]


def test_another_seed_gives_other_rows():
  assert generate(20, 20, seed=1) != generate(20, 20, seed=2)


def test_no_prompt_occurs_twice():
  texts = [text(row) for row in TRAIN + HELDOUT]
  assert len(set(texts)) == len(texts) == 1800


def test_heldout_topics_are_unseen():
  assert len(ALL_ACTIVITIES) * 5 >= 120
  assert topics(TRAIN) == {activity.name for activity in activities(heldout=False)}
  assert topics(HELDOUT) == {activity.name for activity in activities(heldout=True)}
  assert not topics(TRAIN) & topics(HELDOUT)


def test_no_activity_is_named_within_another():
  names = [activity.name for activity in ALL_ACTIVITIES]
  assert not [(a, b) for a, b in itertools.permutations(names, 2) if a in b]


@pytest.mark.parametrize("seed", [1, 2])
def test_split_is_the_same_for_every_seed(seed):
  train, heldout = generate(300, 300, seed)
  assert not topics(train) & topics(HELDOUT) and not topics(heldout) & topics(TRAIN)
  assert not set(map(kinds, train)) & set(map(kinds, HELDOUT))


LENGTH = {"min_words", "max_words"}  # in every row


def test_heldout_combinations_are_unseen_but_each_kind_is_in_both():
  train, heldout = set(map(kinds, TRAIN)), set(map(kinds, HELDOUT))
  assert not train & heldout
  assert set().union(*train) == set().union(*heldout) == {*INSTRUCTIONS, *LENGTH}
  assert all(combination > LENGTH and len(combination) == 4 for combination in train | heldout)


def test_only_the_order_of_kinds_varies_within_a_combination():
  train = {frozenset(combination) for combination in combinations(heldout=False)}
  assert len(train) == len(combinations(heldout=False))
  assert train.isdisjoint(map(frozenset, combinations(heldout=True)))


def test_rows_are_valid_for_the_checks_teacher():
  for index, row in enumerate(TRAIN + HELDOUT):
    validate(row["checks"], f"row {index}")
    assert [message["role"] for message in row["prompt"]] == ["user"]


def test_prompt_names_every_argument_of_its_checks():
  for row in TRAIN + HELDOUT:
    for check in row["checks"]:
      for value in (value for key, value in check.items() if key != "name"):
        for part in value if isinstance(value, list) else [value]:
          assert (f'"{part}"' if isinstance(part, str) else f" {part} ") in text(row).replace(".", " ")


def test_prompt_is_short_and_fully_formatted():
  for row in TRAIN + HELDOUT:
    assert len(text(row).split()) <= 45
    assert not set("{}") & set(text(row))
    assert "1 sentences" not in text(row)


def test_words_of_an_activity_do_not_contradict_the_other_instructions():
  for activity in ALL_ACTIVITIES:
    assert len(activity.include) == 3 and len(activity.exclude) == 2
    excluded = [{"name": "exclude_words", "words": list(activity.exclude)}]
    for phrase in activity.include:
      assert failed(phrase, [*excluded, {"name": "no_commas"}]) == []


def test_some_answer_satisfies_every_row():
  for row in TRAIN + HELDOUT:
    checks = {check["name"]: check for check in row["checks"]}
    words = " ".join(checks.get("include_words", {}).get("words", ["yes"]))
    number = " 7" if "include_number" in checks else ""
    steps = checks.get("numbered_list", {}).get("count", 0)
    items = "".join(f"\n{number}. go" for number in range(1, steps + 1))
    said = 2 * steps + len(words.split()) + len(number.split())
    filler = " so" * max(0, checks["min_words"]["limit"] - said)
    answer = f"{words}{number}{filler}{items}?"
    assert failed(answer, row["checks"]) == [], (text(row), answer)


def test_more_rows_than_there_are_prompts_are_refused():
  with pytest.raises(UserError, match=r"^1000000 train prompts cannot be generated; ask for 0 to \d+$"):
    generate(10**6, 1, seed=0)
  with pytest.raises(UserError, match=r"^-1 heldout prompts"):
    generate(1, -1, seed=0)

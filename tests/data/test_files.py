"""Prompts and preferences in the formats that TRL reads."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsalign_jax.data.files import evenly, read_preferences, read_prompts, write_jsonl
from tsalign_jax.types import PreferencePair, UserError

USER = [{"role": "user", "content": "hi"}]


def jsonl(tmp_path, *rows) -> str:
  file = tmp_path / "rows.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def test_half_a_character_is_named_by_its_line(tmp_path):
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "a whole one: \\ud83d\\ude00"}\n{"prompt": "half of it: \\ud83d"}\n')
  with pytest.raises(UserError, match=r"prompts.jsonl: line 2 holds half a character"):
    read_prompts(str(file))


def test_text_and_messages_are_the_same_prompt(tmp_path):
  first, second = read_prompts(jsonl(tmp_path, {"prompt": "hi"}, {"prompt": USER}))
  assert first.messages == second.messages == USER
  assert (first.id, second.id) == (0, 1)


def test_parquet_and_datasets_give_what_jsonl_gives(tmp_path):
  rows = [{"prompt": USER, "other": 1}, {"prompt": [*USER, {"role": "assistant", "content": "ho"}, *USER], "other": 2}]
  expected = read_prompts(jsonl(tmp_path, *rows))
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
  assert read_prompts(str(tmp_path / "rows.parquet")) == expected
  (tmp_path / "hub").mkdir()
  datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train-0.parquet")
  assert read_prompts(f"{tmp_path / 'hub'}@train") == expected


PAIR = PreferencePair(USER, "good", "bad")
FORMATS = {
  "text": {"prompt": "hi", "chosen": "good", "rejected": "bad"},
  "conversational": {
    "prompt": USER,
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
  },
  "implicit prompt": {
    "chosen": [*USER, {"role": "assistant", "content": "good"}],
    "rejected": [*USER, {"role": "assistant", "content": "bad"}],
  },
}


MORE_TURNS = [{"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("good", "bad"))
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
  ("prompt", "turns", "expected"),
  [
    (USER, MORE_TURNS, [*USER, *MORE_TURNS]),  # goes on where the prompt ends
    ("hi", MORE_TURNS, [*USER, *MORE_TURNS]),
    (" hi ", [*USER, *MORE_TURNS], [*USER, *MORE_TURNS]),  # repeats it
    ("hi", [SYSTEM, *USER], [SYSTEM, *USER]),  # repeats it behind something that it leaves out
  ],
)
def test_prompt_beside_whole_conversations_is_not_lost(prompt, turns, expected, tmp_path):
  row = {"prompt": prompt, "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
  assert read_preferences(jsonl(tmp_path, row)) == [PAIR._replace(prompt=expected)]


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"prompt": "another"}, "row 1: chosen and rejected begin with another user turn than `prompt` ends with"),
    ({"rejected": [*USER, *USER]}, "row 1: a response is text or one assistant message"),
  ],
)
def test_conversations_that_do_not_fit_are_named(changes, said, tmp_path):
  row = {"prompt": "hi", "chosen": [*USER, GOOD], "rejected": [*USER, BAD]}
  with pytest.raises(UserError, match=said):
    read_preferences(jsonl(tmp_path, row | changes))


@pytest.mark.parametrize("form", FORMATS)
def test_every_preference_format_gives_the_same_pair(form, tmp_path):
  assert read_preferences(jsonl(tmp_path, FORMATS[form])) == [PAIR]


def test_preference_row_without_rejected_is_named(tmp_path):
  with pytest.raises(UserError, match="row 2: no `rejected`"):
    read_preferences(jsonl(tmp_path, FORMATS["text"], {"prompt": "hi", "chosen": "good"}))


def test_margin_is_read_from_the_column_that_is_named(tmp_path):
  rows = [FORMATS["implicit prompt"] | {"margin": 9, "strength": value} for value in (2, 0.5)]
  assert read_preferences(jsonl(tmp_path, *rows)) == [PAIR, PAIR]
  assert read_preferences(jsonl(tmp_path, *rows), margin="strength") == [PAIR._replace(margin=m) for m in (2.0, 0.5)]


@pytest.mark.parametrize("value", [None, "2", True, float("nan"), float("inf")])
def test_margin_that_is_no_number_is_named(value, tmp_path):
  rows = [FORMATS["text"] | {"margin": 1.0}, FORMATS["text"] | {"margin": value}]
  with pytest.raises(UserError, match="row 2: `margin`, its margin, is a number, this one is"):
    read_preferences(jsonl(tmp_path, *rows), margin="margin")
  with pytest.raises(UserError, match="row 1: no `strength`, which was to be its margin; its keys are prompt"):
    read_preferences(jsonl(tmp_path, *rows), margin="strength")


def test_empty_file_is_refused(tmp_path):
  with pytest.raises(UserError, match="there is no row in it"):
    read_prompts(jsonl(tmp_path))


@pytest.mark.parametrize(
  ("most", "taken"), [(1, [0]), (2, [0, 5]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))]
)
def test_a_limit_takes_rows_from_the_whole_file(most, taken):
  assert evenly(range(10), most) == taken


def test_written_file_holds_one_row_a_line_and_nothing_is_left_beside_it(tmp_path):
  rows = [{"prompt": USER}, {"prompt": "two\nlines, é"}]
  path = write_jsonl(rows, tmp_path / "data" / "train.jsonl")
  assert [json.loads(line) for line in path.read_text().splitlines()] == rows
  assert list(path.parent.iterdir()) == [path]

"""The schema: every field is read and described, and the shipped configurations load."""

import datetime
import re
from pathlib import Path

import pytest
import yaml

import tsalign_jax
from tsalign_jax.config import (
  ChecksTeacher,
  Config,
  JudgeTeacher,
  RewardConfig,
  Section,
  changed_keys,
  dump_config,
  load_config,
)
from tsalign_jax.loop import _may_change
from tsalign_jax.types import UserError

PACKAGE = Path(tsalign_jax.__file__).parent
CODE = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py") if file != PACKAGE / "config.py")
CODE += "\n" + re.sub(r"^  \w+: .*$", "", (PACKAGE / "config.py").read_text(), flags=re.M)


def sections(section=Section):
  for child in section.__subclasses__():
    yield child
    yield from sections(child)


@pytest.mark.parametrize("section", sorted(set(sections()), key=lambda s: s.__name__), ids=lambda s: s.__name__)
def test_every_field_is_read_and_described(section):
  for name, field in section.model_fields.items():
    by_name = section.__name__ == "Mesh"  # passed to make_mesh as a whole
    assert by_name or re.search(rf"\.{name}\b", CODE) or f'"{name}"' in CODE, name
    assert field.description, name


@pytest.mark.parametrize("file", sorted((PACKAGE.parent / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configuration_is_valid(file):
  config = load_config(file, schema=RewardConfig if "reward" in file.stem else Config)
  assert config.run.parts[0] == "runs"
  assert file.name in (PACKAGE.parent / "configs" / "README.md").read_text()


def test_overrides_reach_nested_keys():
  config = load_config(PACKAGE.parent / "configs" / "demo.yaml", ["align.lora.rank=4", "prompts.per_round=null"])
  assert config.align.lora.rank == 4 and config.prompts.per_round is None


def test_changed_keys_are_found_at_any_depth():
  old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}
  assert changed_keys(old, new) == [("a.c", 2, 5)]


def test_config_is_hashable_so_that_programs_can_be_shared():
  hash(Config.model_fields["align"].default)


def test_changed_keys_are_found_in_lists_and_another_kind_is_named_before_its_keys():
  members = [{"kind": "x", "a": 1}, {"kind": "y"}]
  assert changed_keys({"m": members}, {"m": [{"kind": "x", "a": 2}, {"kind": "y"}]}) == [("m.0.a", 1, 2)]
  assert changed_keys({"m": members}, {"m": members[:1]}) == [("m", members, members[:1])]
  assert changed_keys({"t": {"b": 1, "kind": "x"}}, {"t": {"a": 1, "kind": "y"}})[0] == ("t.kind", "x", "y")


@pytest.mark.parametrize(
  ("key", "old", "new", "allowed"),
  [
    ("teacher.endpoint.budget", None, 5, True),
    ("teacher.members.0.endpoint.timeout", 1, 2, True),
    ("teacher.endpoint", {}, None, False),
    ("teacher.model", "a", "b", False),
    ("rounds", 2, 3, True),
    ("rounds", 3, 2, False),
    ("align.microbatch_tokens", 8192, 4096, True),
    ("policy.remat", False, True, True),
    ("mesh.tensor", 1, 2, True),
    ("sampling_mesh", None, {"data": 2}, True),
    ("align.batch_size", 32, 16, False),
    ("sampling.responses", 8, 4, False),
    ("evaluation.judges.gold.endpoint.budget", 5, 9, True),
    ("evaluation.judges.gold.batch_tokens", 8192, 4096, True),
    ("mesh.data", 1, 2, True),
    ("teacher.members.0.endpoint.concurrency", 1, 2, True),
    ("evaluation.judges.gold.endpoint.base_url", 1, 2, True),
    ("align.remat", 1, 2, True),
    ("evaluation.judges.mesh.path", 1, 2, False),
    ("evaluation.judges.lanes.model", 1, 2, False),
    ("evaluation.judges.remat", 1, 2, False),
    ("teacher.extra_body.mesh.data", 1, 2, False),
    ("teacher.extra_body.lanes", 1, 2, False),
    ("align.beta", 1, 2, False),
    ("teacher.endpoint.budget", 1, 2, True),
  ],
)
def test_only_what_results_do_not_depend_on_may_change_and_rounds_only_grow(key, old, new, allowed):
  assert _may_change(key, old, new, evaluated=True) == allowed


def test_judges_may_change_until_they_have_judged():
  assert _may_change("evaluation.judges.gold.model", "a", "b", evaluated=False)
  assert not _may_change("evaluation.judges.gold.model", "a", "b", evaluated=True)


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    (["mining.strategy=random", "mining.min_margin=0.5"], "mining: min_margin is for strategy best_worst"),
    (["distil.replay=pairs.jsonl", "distil.replay_share=0"], "distil: replay would not be used with replay_share 0"),
    (["sampling.lanes=9", "sampling.responses=8"], "sampling: lanes is 9, but a prompt has 8 responses; lower it"),
    (
      ["student.warm_start=null", "distil=null", "student.remat=true"],
      "student.remat is for a student that is trained",
    ),
  ],
)
def test_what_would_be_ignored_is_refused(overrides, words):
  with pytest.raises(UserError, match=words):
    load_config(PACKAGE.parent / "configs" / "demo.yaml", overrides)


JUDGE = {"kind": "llm_judge", "model": "m", "endpoint": {"base_url": "http://host:1/v1"}}


def with_teacher(teacher, tmp_path) -> Config:
  content = yaml.safe_load((PACKAGE.parent / "configs" / "demo.yaml").read_text()) | {"teacher": teacher}
  file = tmp_path / "config.yaml"
  file.write_text(yaml.safe_dump(content))
  return load_config(file)


def test_teacher_is_told_by_its_kind_which_is_checks_unless_said(tmp_path):
  assert isinstance(with_teacher({}, tmp_path).teacher, ChecksTeacher)
  assert isinstance(with_teacher(JUDGE, tmp_path).teacher, JudgeTeacher)
  members = with_teacher({"kind": "ensemble", "members": [{"kind": "checks"}, JUDGE]}, tmp_path).teacher.members
  assert [member.kind for member in members] == ["checks", "llm_judge"]


def test_configuration_with_any_teacher_survives_being_written_and_read(tmp_path):
  ranker = JUDGE | {"kind": "ranker", "demonstrations": "d.jsonl"}
  config = with_teacher({"kind": "ensemble", "members": [JUDGE, ranker]}, tmp_path)
  file = tmp_path / "again.yaml"
  file.write_text(dump_config(config))
  assert load_config(file) == config


def at(key, value):
  return JUDGE | {"endpoint": JUDGE["endpoint"] | {key: value}}


WRONG_TEACHERS = {
  "unknown kind": ({"kind": "llm_jugde"}, "teacher.kind: unknown kind 'llm_jugde'; did you mean llm_judge? (known: "),
  "strange kind": (
    {"kind": "x"},
    "teacher.kind: unknown kind 'x' (known: checks, reward_model, llm_judge, ranker, ensemble)",
  ),
  "misspelt key": (JUDGE | {"modle": "m"}, "teacher.modle: unknown key; did you mean teacher.model?"),
  "misspelt key, no kind": ({"defualt": []}, "teacher.defualt: unknown key; did you mean teacher.default?"),
  "misspelt key within": (
    at("retrys", 1),
    "teacher.endpoint.retrys: unknown key; did you mean teacher.endpoint.retries?",
  ),
  "missing": ({"kind": "llm_judge", "model": "m"}, "teacher.endpoint: missing; this key is required"),
  "one member": ({"kind": "ensemble", "members": [JUDGE]}, "teacher.members: Tuple should have at least 2 items"),
  "no members": ({"kind": "ensemble"}, "teacher.members: missing; this key is required"),
  "member without a kind": (
    {"kind": "ensemble", "members": [JUDGE, {}]},
    "teacher.members.1.kind: missing; this key is required (known: checks, reward_model, llm_judge, ranker)",
  ),
  "member misspelt": (
    {"kind": "ensemble", "members": [JUDGE, JUDGE | {"modle": "m"}]},
    "teacher.members.1.modle: unknown key; did you mean teacher.members.1.model?",
  ),
  "budget without prices": (
    at("budget", 5),
    "teacher.endpoint: a budget needs prices; set input_price and output_price",
  ),
  "no address": (
    at("base_url", "localhost:8000"),
    "teacher.endpoint: base_url must be a valid address, http:// or https://",
  ),
  "no such host": (at("base_url", "http://1.2.3.999/v1"), "teacher.endpoint: base_url must be a valid address"),
  "what no request can hold": (JUDGE | {"extra_body": {"on": datetime.date(2026, 1, 2)}}, "teacher.extra_body.on"),
  "several answers": (JUDGE | {"extra_body": {"n": 4}}, "teacher: extra_body must not hold 'n'"),
}


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_wrong_teacher_is_one_sentence(case, tmp_path):
  teacher, words = WRONG_TEACHERS[case]
  with pytest.raises(UserError) as error:
    with_teacher(teacher, tmp_path)
  assert words in str(error.value)


SECRET = "sk-hush-hush"


@pytest.mark.parametrize(
  "teacher",
  [
    at("api_key", SECRET),
    at("api_key_env", SECRET),
    at("base_url", f"https://{SECRET}@host/v1"),
    at("base_url", f"https://host/v1?key={SECRET}"),
    JUDGE | {"extra_body": {"API-Key": SECRET}},
    JUDGE | {"extra_body": {"user_config": {"models": [{"params": {"api_key": SECRET}}]}}},
    JUDGE | {"extra_body": {"headers": {"Authorization": f"Bearer {SECRET}"}}},
  ],
)
def test_key_in_the_wrong_place_is_refused_without_repeating_it(teacher, tmp_path):
  with pytest.raises(UserError) as error:
    with_teacher(teacher, tmp_path)
  assert SECRET not in str(error.value)

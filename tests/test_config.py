"""The schema: every field is read and described, and the shipped configurations load."""

import re
from pathlib import Path

import pytest

import tsalign_jax
from tsalign_jax.config import Config, Section, changed_keys, load_config

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
  assert load_config(file).run.parts[0] == "runs"


def test_overrides_reach_nested_keys():
  config = load_config(PACKAGE.parent / "configs" / "demo.yaml", ["align.lora.rank=4", "prompts.per_round=null"])
  assert config.align.lora.rank == 4 and config.prompts.per_round is None


def test_changed_keys_are_found_at_any_depth():
  old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}
  assert changed_keys(old, new) == [("a.c", 2, 5)]


def test_config_is_hashable_so_that_programs_can_be_shared():
  hash(Config.model_fields["align"].default)

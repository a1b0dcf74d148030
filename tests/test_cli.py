"""What a person sees: one sentence and exit code 2 for wrong input, before any device work."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import yaml

COMMAND = [sys.executable, "-m", "tsalign_jax.cli"]


def tsalign(*arguments) -> subprocess.CompletedProcess:
  """Runs the command without any device: touching one would fail."""
  environment = os.environ | {"JAX_PLATFORMS": "nothing", "COLUMNS": "200"}
  return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return tiny.run_config(tmp_path_factory.mktemp("cli"))


def edited(config, tmp_path, edit) -> list:
  content = yaml.safe_load(config.read_text())
  edit(content)
  file = tmp_path / "config.yaml"
  file.write_text(yaml.safe_dump(content | {"run": str(tmp_path / "run")}))
  return ["run", file]


def prompts_of(tmp_path, *rows):
  file = tmp_path / "prompts.jsonl"
  file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return f"prompts.train={file}"


def expect_error(result: subprocess.CompletedProcess, *parts: str) -> None:
  assert result.returncode == 2, result.stderr
  (line,) = [line for line in result.stderr.splitlines() if line.strip()]
  assert line.startswith("error: ")
  for part in parts:
    assert part in line


WRONG = {
  "unknown key": (["align.betta=0.2"], ["align.betta: unknown key; did you mean align.beta?"]),
  "unknown section": (["sampler={}"], ["sampler: unknown key; did you mean sampling?"]),
  "wrong type": (["sampling.temperature=hot"], ["sampling.temperature", "valid number", "'hot'"]),
  "out of range": (["align.beta=-1"], ["align.beta", "greater than 0", "-1"]),
  "one response": (["sampling.responses=1"], ["sampling", "responses is 1", "at least 2"]),
  "wrong choice": (["align.reference=first"], ["align.reference", "'previous' or 'initial'", "'first'"]),
  "no such prompts": (["prompts.train=nowhere.jsonl"], ["nowhere.jsonl: there is no such file"]),
  "no such model": (["policy.path=nowhere"], ["nowhere: no config.json there"]),
  "not an override": (["rounds"], ["'rounds': an override is key=value"]),
  "unknown check": (["teacher.default=[{name: max_wrods, limit: 3}]"], ["max_wrods", "max_words"]),
  "no such teacher": (["teacher={kind: reward_model, path: nowhere}"], ["nowhere: no config.json there"]),
  "unknown adapter target": (["align.lora.targets=[q_porj]"], ["align.lora.targets", "q_porj", "q_proj"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_one_sentence(case, config, tmp_path):
  overrides, parts = WRONG[case]
  expect_error(tsalign("run", config, f"run={tmp_path / 'run'}", *overrides), *parts)


ROWS = {
  "no prompt": ({"text": "hi"}, ["row 2", "no `prompt`", "text"]),
  "no user turn": ({"prompt": [{"role": "system", "content": "be kind"}]}, ["row 2", "no user turn"]),
  "ends with an answer": (
    {"prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    ["row 2", "must end with a user turn", "'assistant'"],
  ),
  "broken JSON": ('{"prompt": ', ["line 2", "not valid JSON"]),
  "unknown check": ({"prompt": "hi", "checks": [{"name": "max_word", "limit": 3}]}, ["row 2", "max_words"]),
  "no check at all": ({"prompt": "hi"}, ["row 2", "check"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_wrong_row_is_named(case, config, tmp_path):
  row, parts = ROWS[case]
  good = {"prompt": "hi", "checks": [{"name": "max_words", "limit": 3}]}
  override = prompts_of(tmp_path, good, row)
  expect_error(tsalign("run", config, f"run={tmp_path / 'run'}", override), "prompts.jsonl", *parts)


def test_missing_key_is_named(config, tmp_path):
  expect_error(tsalign(*edited(config, tmp_path, lambda content: content.pop("policy"))), "policy: missing")


def test_missing_file_is_named(tmp_path):
  expect_error(tsalign("run", tmp_path / "none.yaml"), "none.yaml: there is no such configuration file")


def test_unknown_architecture_is_refused_with_the_known_ones(config, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path}")
  expect_error(result, "GPT2LMHeadModel is not supported", "LlamaForCausalLM", "Gemma3ForCausalLM")


def test_architecture_unknown_to_transformers_is_refused_too(config, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "architectures": ["NovelForCausalLM"]}))
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path}")
  expect_error(result, "NovelForCausalLM is not supported", "LlamaForCausalLM")


def test_tokenizer_without_chat_template_is_refused(config, tmp_path):
  tiny.decoder("llama", tmp_path / "policy")
  tiny.tokenizer(tmp_path / "policy", template=None)
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path / 'policy'}")
  expect_error(result, "has no chat template")


def test_student_without_head_needs_a_warm_start(config, tmp_path):
  tiny.encoder("bert", tmp_path / "student")
  tiny.bert_tokenizer(tmp_path / "student")
  overrides = [f"run={tmp_path / 'run'}", f"student.path={tmp_path / 'student'}", "student.warm_start=null"]
  expect_error(tsalign("run", config, *overrides), "has no reward head; set student.warm_start")


def test_over_long_prompts_are_dropped_counted_and_listed(config, tmp_path):
  """The one mistake that does not stop a run, unless no prompt is left."""
  result = tsalign("run", config, f"run={tmp_path / 'run'}", "prompts.max_tokens=3")
  expect_error(result, "every prompt is longer than prompts.max_tokens = 3")


def test_help_speaks_to_a_stranger():
  text = tsalign("run", "--help").stdout
  assert "continues a run that was stopped" in text and "align.beta=0.2" in text


MORE_WRONG = {
  "zero ways": (["mesh.data=0"], ["mesh.data", "(got 0)"]),
  "negative seed": (["seed=-1"], ["seed", "greater than or equal to 0"]),
  "broken YAML": (["prompts.train=[a"], ["prompts.train=[a", "not a YAML value"]),
  "too long": (["prompts.max_tokens=127"], ["prompts.max_tokens + sampling.max_new_tokens = 139", "128 tokens"]),
  "large warm start": (["student.warm_start.prompts=24"], ["student.warm_start.prompts = 24", "24 usable"]),
}


@pytest.mark.parametrize("case", MORE_WRONG)
def test_wrong_combination_is_one_sentence(case, config, tmp_path):
  overrides, parts = MORE_WRONG[case]
  expect_error(tsalign("run", config, f"run={tmp_path / 'run'}", *overrides), *parts)

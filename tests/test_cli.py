"""What a person sees: one sentence and exit code 2 for wrong input, before any device work."""

import json
import os
import subprocess
import sys

import gguf_files
import pytest
import tiny
import yaml
from refused import expect_error
from report.fabricate import fabricate


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
  "zero ways": (["mesh.data=0"], ["mesh.data", "(got 0)"]),
  "negative seed": (["seed=-1"], ["seed", "greater than or equal to 0"]),
  "broken YAML": (["prompts.train=[a"], ["prompts.train=[a", "not a YAML value"]),
  "too long": (["prompts.max_tokens=127"], ["prompts.max_tokens + sampling.max_new_tokens = 139", "128 tokens"]),
  "large warm start": (["student.warm_start.prompts=24"], ["student.warm_start.prompts = 24", "24 usable"]),
  "unknown adapter target": (["align.lora.targets=[q_porj]"], ["align.lora.targets", "q_porj", "q_proj"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_one_sentence(case, config, tmp_path, tsalign):
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
def test_wrong_row_is_named(case, config, tmp_path, tsalign):
  row, parts = ROWS[case]
  good = {"prompt": "hi", "checks": [{"name": "max_words", "limit": 3}]}
  override = prompts_of(tmp_path, good, row)
  expect_error(tsalign("run", config, f"run={tmp_path / 'run'}", override), "prompts.jsonl", *parts)


def test_missing_key_is_named(config, tmp_path, tsalign):
  expect_error(tsalign(*edited(config, tmp_path, lambda content: content.pop("policy"))), "policy: missing")


@pytest.mark.parametrize("command", ["run", "train-reward", "bench"])
def test_missing_file_is_named_by_the_command_as_people_start_it(command, tmp_path):
  start = [sys.executable, "-m", "tsalign_jax.cli", command, tmp_path / "none.yaml"]
  result = subprocess.run(start, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
  expect_error(result, "none.yaml: there is no such configuration file")


def test_unknown_architecture_is_refused_with_the_known_ones(config, tmp_path, tsalign):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path}")
  expect_error(result, "GPT2LMHeadModel is not supported", "LlamaForCausalLM", "Gemma3ForCausalLM")


def test_architecture_unknown_to_transformers_is_refused_too(config, tmp_path, tsalign):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "architectures": ["NovelForCausalLM"]}))
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path}")
  expect_error(result, "NovelForCausalLM is not supported", "LlamaForCausalLM")


def test_tokenizer_without_chat_template_is_refused(config, tmp_path, tsalign):
  tiny.decoder("llama", tmp_path / "policy")
  tiny.tokenizer(tmp_path / "policy", template=None)
  result = tsalign("run", config, f"run={tmp_path / 'run'}", f"policy.path={tmp_path / 'policy'}")
  expect_error(result, "has no chat template")


def test_student_without_head_needs_a_warm_start(config, tmp_path, tsalign):
  tiny.encoder("bert", tmp_path / "student")
  tiny.bert_tokenizer(tmp_path / "student")
  overrides = [f"run={tmp_path / 'run'}", f"student.path={tmp_path / 'student'}", "student.warm_start=null"]
  expect_error(tsalign("run", config, *overrides), "has no reward head; set student.warm_start")


def test_prompts_of_which_all_are_too_long_are_refused(config, tmp_path, tsalign):
  """Some that are too long are dropped and counted: the one mistake that does not stop a run."""
  result = tsalign("run", config, f"run={tmp_path / 'run'}", "prompts.max_tokens=3")
  expect_error(result, "every prompt is longer than prompts.max_tokens = 3")


def test_help_speaks_to_a_stranger(tsalign):
  text = tsalign("run", "--help").stdout
  assert "continues a run that was stopped" in text and "align.beta=0.2" in text


def test_generate_writes_both_files(tmp_path, tsalign):
  result = tsalign("generate", tmp_path, "--train", 3, "--heldout", 2)
  assert result.returncode == 0, result.stderr
  for name, count in (("train", 3), ("heldout", 2)):
    assert f"Wrote {tmp_path / name}.jsonl" in result.stdout
    assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == count


def test_report_and_verdicts_show_a_run(tmp_path, tsalign):
  run = fabricate(tmp_path / "run", 2)
  result = tsalign("report", run)
  assert result.returncode == 0, result.stderr
  assert f"Report: {run / 'report.html'}" in result.stdout and (run / "report.html").is_file()
  result = tsalign("verdicts", run)
  assert result.returncode == 0, result.stderr
  assert "Verdicts of the teacher" in result.stdout and "round 2 held out" in result.stdout


def test_import_gguf_writes_a_folder_in_the_dtype_asked_for(tmp_path, tsalign):
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"))
  result = tsalign("import-gguf", tmp_path / "model.gguf", tmp_path / "out", "--dtype", "bfloat16")
  assert result.returncode == 0, result.stderr
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
  expect_error(tsalign("import-gguf", tmp_path / "model.gguf", tmp_path / "b", "--dtype", "int8"), "--dtype: 'int8'")

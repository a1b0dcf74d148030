"""Whole runs on tiny models: the files they leave, resuming, refusing, and eight devices against one."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import killed
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers
from rich.console import Console

from tsalign_jax import host_memory, loop
from tsalign_jax.config import load_config
from tsalign_jax.data.tables import read_table
from tsalign_jax.export import export_model
from tsalign_jax.loop import run
from tsalign_jax.manifest import VERSION, Manifest, write_json
from tsalign_jax.models.hf import hf_tensors
from tsalign_jax.models.loading import reward_model
from tsalign_jax.progress import terminal_progress
from tsalign_jax.recipes.step import Step
from tsalign_jax.stages import judge
from tsalign_jax.teachers import checks
from tsalign_jax.types import UserError

QUIET = terminal_progress(Console(quiet=True))
COMMAND = [sys.executable, "-m", "tsalign_jax.cli", "run"]


def metrics_of(folder) -> dict:
  """Metrics without times and speeds, which are the only part that may differ between two runs."""
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics.pop("seconds").keys() == {
    "sample", "score", "mine", "judge", "pair", "align", "distil", "answer", "evaluate"
  }  # fmt: skip
  speed = metrics.pop("pairs_per_second")
  assert speed["student"] > 0 and speed["teacher"] > 0
  return metrics


@pytest.fixture(scope="module")
def setting(tmp_path_factory, environment):
  """A tiny configuration, and the metrics of an undisturbed run of it in a process of its own."""
  folder = tmp_path_factory.mktemp("setting")
  # A judge that differs from the teacher where a prompt brings no checks of its own, and here all do.
  twin = {"default": [{"name": "max_words", "limit": 9}]}
  config = tiny.run_config(folder, evaluation={"resamples": 200, "judges": {"twin": twin}})
  subprocess.run([*COMMAND, config], check=True, env=environment, stdout=subprocess.DEVNULL)
  return folder, config


def saved(checkpoint, mesh, config) -> dict[str, np.ndarray]:
  """The tensors of a student's checkpoint, by their Hugging Face names."""
  model = reward_model(load_config(config).student)
  params = model.restore(checkpoint, mesh)
  return {name: tensor.read() for name, tensor in hf_tensors(params, model.skeleton, model.config, np.float32)}


def test_a_run_leaves_every_table_and_metric(setting, one_device):
  folder, config = setting
  metrics = metrics_of(folder / "run")
  assert metrics["round"] == 2
  assert metrics == metrics_of(folder / "run" / "round_02")
  assert metrics["wins"] + metrics["ties"] + metrics["losses"] == 16 and metrics["undecided"] == 0
  assert 0 <= metrics["win_rate_ci"][0] <= metrics["win_rate"] <= metrics["win_rate_ci"][1] <= 1
  assert metrics["kl_from_initial"] > 0.01  # trained at a high rate: the policy has moved
  for key in ("student_accuracy_mined", "student_accuracy_random"):
    assert set(metrics[key]) == {"initial", "now"} and all(0 <= value <= 1 for value in metrics[key].values())
  for found in metrics["student_calibration"].values():
    assert 0 <= found["error"] <= 0.5 and sum(each["pairs"] for each in found["bins"]) > 8
  assert metrics["student_regret"]["prompts"] == 8 and 0 <= metrics["student_regret"]["pick"] <= 1
  twin = metrics["judges"]["twin"]  # it finds what the teacher finds
  assert twin == {name: metrics[name] for name in twin} and "win_rate_ci" in twin
  for row in pq.read_table(folder / "run" / "round_02" / "comparisons.parquet").to_pylist():
    assert json.loads(row["others"]) == {"twin": row["verdict"]}
  pairs = pq.read_table(folder / "run" / "round_01" / "pairs.parquet").to_pylist()
  assert len(pairs) == json.loads((folder / "run" / "round_01" / "metrics.json").read_text())["pairs"]
  assert (folder / "run" / "report.html").stat().st_size > 5000
  students = [saved(folder / "run" / f"round_{number:02d}" / "student", one_device, config) for number in range(3)]
  for before, after in itertools.pairwise(students):
    assert any(not np.array_equal(before[name], after[name]) for name in before)
  assert not list((folder / "run").glob("*/*.partial")) and not list((folder / "run").glob("*/*.out"))


def test_without_distil_the_student_stays(tmp_path, environment):
  config = tiny.run_config(tmp_path, rounds=1, distil=None, student={"path": str(tmp_path / "student")})
  subprocess.run([*COMMAND, config], check=True, env=environment, stdout=subprocess.DEVNULL)
  metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
  assert not (tmp_path / "run" / "round_01" / "student").exists() and "distil" not in metrics["seconds"]
  for key in ("student_accuracy_mined", "student_accuracy_random", "student_calibration"):
    assert metrics[key]["initial"] == metrics[key]["now"]


def test_everything_dropped_is_counted(setting):
  folder, _ = setting
  run_folder = folder / "run"
  metrics = metrics_of(run_folder)
  candidates = pq.read_table(run_folder / "round_02" / "candidates.parquet").to_pylist()
  assert len(candidates) == 8
  assert metrics["pairs"] + sum(metrics["dropped"].values()) == 8


def test_policy_is_its_own_reference_at_the_first_step(setting):
  folder, _ = setting
  for number in (1, 2):
    first = json.loads((folder / "run" / f"round_{number:02d}" / "align.jsonl").read_text().splitlines()[0])
    assert first["logps/drift"] == 0.0 and first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2))


def test_running_again_does_nothing_again(setting, environment):
  folder, config = setting
  before = {file: file.stat().st_mtime_ns for file in (folder / "run").glob("round_*/*.parquet")}
  subprocess.run([*COMMAND, config], check=True, env=environment, stdout=subprocess.DEVNULL)
  assert before == {file: file.stat().st_mtime_ns for file in (folder / "run").glob("round_*/*.parquet")}


KILL_POINTS = {  # how much of a stage is done when the process ends: responses, or steps
  "inside sample": ("round_01/sample", 8),
  "between score and mine": ("round_01/mine", 0),
  "inside align, before a checkpoint": ("round_01/align", 1),
  "inside align, after a checkpoint": ("round_01/align", 3),
  "inside distil": ("round_01/distil", 3),
  "between two rounds": ("round_02/sample", 0),
  "inside the second round": ("round_02/sample", 20),
  "inside evaluate": ("round_02/evaluate", 1),
}


def test_killed_over_and_over_a_run_ends_as_an_undisturbed_one(setting, environment, tmp_path):
  """At one point after the other, each time going on from where it was killed."""
  folder, config = setting
  arguments = ["run", config, f"run={tmp_path / 'run'}"]
  for point, (stage, amount) in KILL_POINTS.items():
    command = [sys.executable, killed.__file__, stage, str(amount), *arguments]
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL, point
    assert stage not in Manifest(tmp_path / "run").stages
  subprocess.run([*COMMAND, *arguments[1:]], check=True, env=environment, stdout=subprocess.DEVNULL)
  assert metrics_of(tmp_path / "run") == metrics_of(folder / "run")
  assert written(tmp_path / "run") == written(folder / "run")


def written(run) -> dict[str, str]:
  """The hash of every table and log of a run: checkpoints hold times."""
  stages = Manifest(run).stages.values()
  found = {file: digest for entry in stages for file, digest in entry["writes"].items() if Path(file).suffix}
  assert len(found) > 20
  return found


def test_eight_devices_give_the_single_device_result(setting, tmp_path):
  folder, config = setting
  spread = ["mesh.fsdp=4", "mesh.tensor=2", "sampling_mesh={data: 2, fsdp: 2, tensor: 2}"]
  settings = load_config(config, [f"run={tmp_path / 'run'}", *spread, "rounds=1"])
  assert len(jax.devices()) == 8
  run(settings, QUIET)
  ours, theirs = metrics_of(tmp_path / "run"), metrics_of(folder / "run" / "round_01")
  responses = [pq.read_table(f / "round_01" / "responses.parquet") for f in (tmp_path / "run", folder / "run")]
  assert responses[0].column("tokens").equals(responses[1].column("tokens"))
  assert _close(ours, theirs)


def _close(a, b) -> bool:
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(map(_close, a, b))
  return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)


def copy_of(setting, tmp_path):
  folder, config = setting
  shutil.copytree(folder / "run", tmp_path / "run")
  return load_config(config, [f"run={tmp_path / 'run'}"])


def test_changed_configuration_is_named_and_refused(setting, tmp_path):
  settings = copy_of(setting, tmp_path)
  changed = settings.model_copy(update={"align": settings.align.model_copy(update={"beta": 0.7})})
  with pytest.raises(UserError, match=r"align.beta: this run folder was made with 0.1, the configuration now says 0.7"):
    run(changed, QUIET)


def test_teacher_that_changed_behind_the_configuration_is_named_and_refused(setting, tmp_path, monkeypatch):
  settings = copy_of(setting, tmp_path)
  rewritten = dataclasses.replace(checks._REGISTRY["max_words"], source="another version's")
  monkeypatch.setitem(checks._REGISTRY, "max_words", rewritten)
  with pytest.raises(
    UserError, match=r"teacher: this run began with 'checks-\w+', which now is 'checks-\w+'; put back"
  ):
    run(settings, QUIET)


def test_the_teacher_as_a_further_judge_is_refused_before_anything_happens(tmp_path):
  config = tiny.run_config(tmp_path, evaluation={"judges": {"gold": {}}})
  with pytest.raises(UserError, match=r"evaluation.judges.gold: this is the teacher again, or a member of it"):
    run(load_config(config), QUIET)
  assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize(
  "judge",
  [
    {"kind": "reward_model", "path": "TEACHER", "dtype": "float32", "max_tokens": 64},
    {"kind": "ensemble", "members": [{"kind": "checks"}, {"kind": "reward_model", "path": "TEACHER"}]},
  ],
)
def test_the_teacher_in_another_dtype_is_no_other_judge(judge, tmp_path):
  tiny.decoder("qwen3", tmp_path / "teacher", reward=True)
  tiny.tokenizer(tmp_path / "teacher")
  judge = json.loads(json.dumps(judge).replace("TEACHER", str(tmp_path / "teacher")))
  teacher = {"kind": "reward_model", "path": str(tmp_path / "teacher")}
  config = tiny.run_config(tmp_path, teacher=teacher, evaluation={"judges": {"gold": judge}})
  with pytest.raises(UserError, match=r"evaluation.judges.gold: this is the teacher again, or a member of it"):
    run(load_config(config), QUIET)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_layout_that_an_encoder_cannot_have_is_refused_before_anything_happens(who, tmp_path):
  config = tiny.run_config(tmp_path, teacher={"kind": "reward_model", "path": str(tmp_path / "student")})
  with pytest.raises(UserError, match=r"student: the layers of an encoder are always apart; leave layout = stacked"):
    run(load_config(config, [f"{who}.layout=stacked"]), QUIET)
  assert not (tmp_path / "run").exists()


def one_stage(name, stage) -> list[Step]:
  return [Step(f"round_01/{name}", stage, {}, {"out": "out.txt"})]


def test_a_stage_that_needs_too_much_memory_names_what_to_lower(tmp_path):
  def align(job):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

  settings = load_config(tiny.run_config(tmp_path))
  with pytest.raises(UserError, match=r"round_01/align: out of device memory; lower align.microbatch_tokens, or set"):
    loop.run_steps(settings, one_stage("align", align), QUIET, lambda: None, lambda *_: None)


def test_what_compilers_freed_is_given_back_while_a_run_lasts(tmp_path, monkeypatch):
  def score(job):
    jax.jit(lambda x: x * 17 + 3)(np.ones(7))
    compiled.append(len(given_back))
    job.writes["out"].write_text("done")
    return {}

  given_back, compiled = [], []
  monkeypatch.setattr(host_memory, "LONG", 0.0)
  monkeypatch.setattr(host_memory, "give_back", lambda: given_back.append(True))
  settings = load_config(tiny.run_config(tmp_path))
  loop.run_steps(settings, one_stage("score", score), QUIET, lambda: None, lambda *_: None)
  count = len(given_back)
  jax.jit(lambda x: x * 19 + 3)(np.ones(7))
  assert compiled[0] > 0 and len(given_back) == count


def test_what_a_stage_wrote_is_on_disk_before_the_stage_is_in_the_manifest(tmp_path, monkeypatch):
  def score(job):
    job.writes["out"].write_text("done")
    return {}

  synced, fsync = [], os.fsync
  monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.stat(file).st_ino) or fsync(file))
  settings = load_config(tiny.run_config(tmp_path))
  loop.run_steps(settings, one_stage("score", score), QUIET, lambda: None, lambda *_: None)
  order = [settings.run / "round_01", settings.run / "round_01" / "out.txt", settings.run / "manifest.json"]
  assert [inode for inode in synced if inode in [file.stat().st_ino for file in order]] == [
    file.stat().st_ino for file in order
  ]


def test_a_damaged_manifest_or_table_is_named(tmp_path):
  (tmp_path / "manifest.json").write_text('{"version": 2, "sta')
  with pytest.raises(UserError, match=r"manifest.json: damaged \(.*\); restore it, or start a new run folder"):
    Manifest(tmp_path)
  (tmp_path / "00000000.parquet").write_bytes(b"PAR1")
  with pytest.raises(UserError, match=r"00000000.parquet: damaged"):
    read_table(tmp_path / "00000000.parquet")


def test_a_judge_of_a_run_folder_may_change_until_it_has_judged(tmp_path):
  def judged_by(model):
    judge = {"kind": "llm_judge", "model": model, "endpoint": {"base_url": "http://host:1/v1"}}
    return load_config(tiny.run_config(tmp_path, evaluation={"judges": {"gold": judge}}))

  run_folder = judged_by("a").run
  run_folder.mkdir()
  manifest = Manifest(run_folder)
  loop._check_config(judged_by("a"), manifest, [])
  manifest.commit("round_01/sample", {})
  loop._check_config(judged_by("b"), manifest, [])
  manifest.commit("round_01/evaluate", {})
  with pytest.raises(UserError, match=r"evaluation.judges.gold.model: this run folder was made with 'b'"):
    loop._check_config(judged_by("a"), manifest, [])


def test_a_judge_whose_files_changed_after_it_judged_is_refused(tmp_path):
  manifest = tmp_path / "manifest.json"
  manifest.write_text(json.dumps({"version": VERSION, "stages": {}}))
  teacher, gold, other = (types.SimpleNamespace(identity=name) for name in ("teacher 1", "gold 1", "gold 2"))
  loop._check_teachers(tmp_path, teacher, {"gold": gold})
  loop._check_teachers(tmp_path, teacher, {"gold": other})  # it has not judged yet
  manifest.write_text(json.dumps({"version": VERSION, "stages": {"round_01/evaluate": {}}}))
  with pytest.raises(UserError, match=r"evaluation.judges.gold: this run began with 'gold 2', which now is 'gold 1'"):
    loop._check_teachers(tmp_path, teacher, {"gold": gold})
  with pytest.raises(UserError, match=r"teacher: this run began with 'teacher 1', which now is 'gold 2'"):
    loop._check_teachers(tmp_path, other, {"gold": other})


def test_a_member_of_the_teacher_as_a_further_judge_is_refused(tmp_path):
  members = [{"kind": "checks"}, {"kind": "checks", "default": [{"name": "max_words", "limit": 9}]}]
  teacher = {"kind": "ensemble", "members": members}
  config = tiny.run_config(tmp_path, teacher=teacher, evaluation={"judges": {"gold": {}}})
  with pytest.raises(UserError, match=r"evaluation.judges.gold: this is the teacher again, or a member of it"):
    run(load_config(config), QUIET)


def test_prompts_that_the_policy_cannot_read_are_named_before_anything_happens(tmp_path):
  config = tiny.run_config(tmp_path)
  refusing = "{% if 'unheard' in messages[0].content %}{{ raise_exception('too cold') }}{% endif %}"
  tiny.tokenizer(tmp_path / "policy", template=refusing + tiny.TEMPLATE)
  (tmp_path / "heldout.jsonl").write_text('{"prompt": "tell of rain"}\n{"prompt": "tell of the unheard"}\n')
  with pytest.raises(UserError, match=r"heldout.jsonl: row 2, read by the policy: .*'tell of the unheard': too cold"):
    run(load_config(config), QUIET)
  assert not (tmp_path / "run").exists()


def test_prompts_that_the_student_cannot_read_are_named_before_anything_happens(tmp_path):
  config = tiny.run_config(tmp_path)
  tiny.decoder("qwen2", tmp_path / "student", reward=True)
  refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
  tiny.tokenizer(tmp_path / "student", template=refusing + tiny.TEMPLATE)
  rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
  rows[2]["prompt"] = [{"role": role, "content": "be warm"} for role in ("system", "user")]
  (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(
    UserError, match=r"train.jsonl: row 3, read by the student: the chat template refuses .*'be warm'"
  ):
    run(load_config(config), QUIET)


def test_a_run_that_has_not_begun_takes_any_configuration(tmp_path):
  config = tiny.run_config(tmp_path)
  with pytest.raises(UserError, match=r"student.warm_start.prompts = 24 of the 24 usable"):
    run(load_config(config, ["student.warm_start.prompts=24"]), QUIET)
  with pytest.raises(Stop):
    run(load_config(config, ["prompts.max_tokens=50"]), stopping_at("round_00/sample", 1))
  with pytest.raises(UserError, match=r"prompts.max_tokens: this run folder was made with 50"):
    run(load_config(config), QUIET)


def test_a_stage_that_kept_nothing_begins_again_with_other_inputs(tmp_path):
  config, file = tiny.run_config(tmp_path), "round_00/sample.partial/inputs.json"
  with pytest.raises(Stop):
    run(load_config(config), stopping_at("round_00/sample", 0))
  began_with = json.loads((tmp_path / "run" / file).read_text())
  write_json(tmp_path / "run" / file, dict.fromkeys(began_with, "another"))
  with pytest.raises(Stop):
    run(load_config(config), stopping_at("round_00/sample", 1))
  assert json.loads((tmp_path / "run" / file).read_text()) == began_with
  write_json(tmp_path / "run" / file, dict.fromkeys(began_with, "another"))
  with pytest.raises(UserError, match=r"changed while stage round_00/sample was half done"):
    run(load_config(config), QUIET)


def test_a_folder_of_another_version_is_refused(tmp_path):
  config = tiny.run_config(tmp_path)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "manifest.json").write_text(json.dumps({"version": 1, "stages": {}}))
  with pytest.raises(UserError, match=r"manifest.json: written by another version of tsalign_jax"):
    run(load_config(config), QUIET)


def test_a_folder_of_other_runs_is_not_touched(tmp_path):
  config = tiny.run_config(tmp_path)
  kept = tmp_path / "run" / "other" / "round_01" / "score.partial" / "inputs.json"
  kept.parent.mkdir(parents=True)
  kept.write_text("{}")
  with pytest.raises(Stop):
    run(load_config(config), stopping_at("round_00/sample", 0))
  assert kept.exists()


def test_replay_that_is_all_held_out_is_refused(tmp_path):
  config = tiny.run_config(tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").open()]
  pairs = [{"prompt": row["prompt"], "chosen": "the cat", "rejected": "a dog"} for row in rows]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
  with pytest.raises(UserError, match=r"distil.replay: every prompt of .*pairs.jsonl is held out; name another file"):
    run(load_config(config, [f"distil.replay={tmp_path / 'pairs.jsonl'}"]), QUIET)


def test_damaged_artifact_is_named_and_refused(setting, tmp_path):
  settings = copy_of(setting, tmp_path)
  victim = tmp_path / "run" / "round_01" / "scores.parquet"
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 1
  victim.write_bytes(content)
  with pytest.raises(UserError, match=r"scores.parquet: changed or damaged since stage round_01/score wrote it"):
    run(settings, QUIET)
  victim.unlink()
  with pytest.raises(UserError, match=r"scores.parquet: missing, although stage round_01/score wrote it"):
    run(settings, QUIET)


def test_decoder_student_adapters_stacked_layers_and_initial_reference(tmp_path):
  """The other side of every choice that the other runs make, over eight devices, stopped in the middle of training."""
  config = tiny.run_config(tmp_path)
  tiny.decoder("qwen2", tmp_path / "student", reward=True)
  tiny.tokenizer(tmp_path / "student")
  overrides = ["rounds=1", "mesh.fsdp=4", "mesh.tensor=2", "student.warm_start=null", "policy.layout=stacked"]
  overrides += ["student.layout=stacked", "policy.remat=true", "align.reference=initial", "align.lora.rank=2"]
  settings = load_config(config, overrides)
  with pytest.raises(Stop):
    run(settings, stopping_at("round_01/align", 3))
  steps = tmp_path / "run" / "round_01" / "align.partial" / "steps" / "2"
  assert steps.is_dir()
  arrays = {file: file.read_bytes() for file in steps.glob("state/**/d/*")}
  for file, content in arrays.items():
    file.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=r"this half-done training cannot be continued here .*or delete the folder"):
    run(settings, QUIET)
  for file, content in arrays.items():
    file.write_bytes(content)
  run(settings, QUIET)
  undisturbed = load_config(config, [*overrides, f"run={tmp_path / 'undisturbed'}"])
  run(undisturbed, QUIET)
  assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
  assert (tmp_path / "run/round_01/align.jsonl").read_text() == (
    tmp_path / "undisturbed/round_01/align.jsonl"
  ).read_text()


def test_reward_model_teacher_stopped_while_judging_and_continued(tmp_path, monkeypatch):
  """Its tokenizer is not the policy's, and its layers and parameters are spread over eight devices."""
  monkeypatch.setattr(judge, "BATCH", 4)
  config = tiny.run_config(tmp_path)
  tiny.decoder("qwen3", tmp_path / "teacher", reward=True, seed=3)
  tiny.tokenizer(tmp_path / "teacher", words=tiny.WORDS[::-1])
  teacher = f"{{kind: reward_model, path: {tmp_path / 'teacher'}, dtype: float32, batch_tokens: 256, layout: stacked}}"
  overrides = ["rounds=1", "mesh.fsdp=4", "mesh.tensor=2", f"teacher={teacher}"]
  settings = load_config(config, overrides)
  with pytest.raises(Stop):
    run(settings, stopping_at("round_00/judge", 8))
  assert len(list((tmp_path / "run" / "round_00" / "judge.partial").glob("*.parquet"))) == 2
  run(settings, QUIET)
  run(load_config(config, [*overrides, f"run={tmp_path / 'undisturbed'}"]), QUIET)
  assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
  tables = [pq.read_table(tmp_path / name / "round_00" / "verdicts.parquet") for name in ("run", "undisturbed")]
  assert tables[0].equals(tables[1]) and tables[0].num_rows == 16
  assert {path.name for path in (tmp_path / "run").iterdir()} >= {"verdicts.sqlite", "report.html"}
  entry = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["round_01/judge"]
  assert entry["reads"]["teacher_0"] and entry["counts"]["teacher"].startswith("reward_model teacher ")


class Stop(Exception):
  """Raised out of a progress display, to stop a run at a known point."""


def stopping_at(stage: str, steps: int):
  """Progress displays of which that of one stage raises after so many steps."""

  def progress_of(name):
    @contextlib.contextmanager
    def display(total, unit):
      done = 0

      def advance(amount, note="", *, earlier=False):
        nonlocal done
        done += amount
        if name == stage and done >= steps:
          raise Stop

      yield advance

    return display

  return progress_of


def test_exported_policy_and_student_load_in_transformers(setting, tmp_path, one_device):
  folder, config = setting
  for arguments in ([], ["--student"]):
    out = tmp_path / ("student" if arguments else "policy")
    command = [sys.executable, "-m", "tsalign_jax.cli", "export", folder / "run", out, "--dtype", "float32", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
  row = pq.read_table(folder / "run" / "round_02" / "answers.parquet").to_pylist()[0]
  prompt = pq.read_table(folder / "run" / "round_00" / "heldout_prompts.parquet").to_pylist()[0]
  assert prompt["prompt_id"] == row["prompt_id"]
  logits = policy(torch.tensor([prompt["tokens"] + row["tokens"]])).logits[0, len(prompt["tokens"]) - 1 : -1]
  logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(row["tokens"])[:, None]).sum().item()
  assert logp == pytest.approx(row["logprob"], abs=1e-3)
  student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
  assert student.config.num_labels == 1
  trained = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
  for number, same in ((2, True), (1, False)):
    tensors = saved(folder / "run" / f"round_{number:02d}" / "student", one_device, config)
    assert tensors.keys() <= trained.keys()
    assert all(np.array_equal(tensors[name], trained[name]) for name in tensors) == same


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"dtype": "float16"}, "--dtype: 'float16' is unknown; use float32 or bfloat16"),
    ({"round": 3}, r"run: round 3 is not finished; finished rounds: \[1, 2\]"),
    ({"out": "run"}, "run: exists already"),
  ],
)
def test_an_export_that_cannot_be_is_refused(changes, said, setting, tmp_path):
  folder, _ = setting
  wanted = {"out": "out", "round": None, "student": False, "dtype": "float32"} | changes
  (tmp_path / "run").mkdir()
  with pytest.raises(UserError, match=said):
    export_model(folder / "run", **wanted | {"out": tmp_path / wanted["out"]})


def test_two_processes_in_one_folder_are_refused(setting):
  folder, config = setting
  with (folder / "run" / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is running in this folder"):
      run(load_config(config), QUIET)

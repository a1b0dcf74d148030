"""A run: the stages of its recipe one after the other, each committed before the next; resuming is running again."""

import contextlib
import fcntl
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from tsalign_jax.config import Config, RewardConfig, changed_keys, dump_config, load_config
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import fingerprint, prompt_key, read_preferences, read_prompts
from tsalign_jax.host_memory import give_back, give_back_after_compiling
from tsalign_jax.manifest import Manifest, make_durable, write_json
from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.hf import WeightFiles
from tsalign_jax.models.loading import policy_config
from tsalign_jax.models.lora import check_targets
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.recipes.step import Step
from tsalign_jax.recipes.ts_align import round_name, ts_align
from tsalign_jax.report.html import write_report
from tsalign_jax.scoring.reward import check_reader
from tsalign_jax.stages.base import Job, Progress
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.teachers.build import build_judges, build_teacher
from tsalign_jax.types import UserError

INPUTS = "inputs.json"  # of a stage that is half done
TEACHERS = "teachers.json"  # whose verdicts a run holds
GROWING = {"rounds"}  # keys that may grow between two runs on one folder
# What may change, as results depend on it by rounding at most: so a run that does not fit can be made to.
FREE_SECTIONS = {"endpoint", "mesh", "sampling_mesh"}
FREE = {"sampling_mesh", "remat", "checkpoint_every", "microbatch_tokens", "batch_tokens", "batch_prompts", "lanes"}
JUDGES = "evaluation.judges"
# What makes a stage, of a run or of a reward model's training, need less memory; all of it may change.
MEMORY = {
  "sample": "sampling.batch_prompts or sampling.lanes",
  "answer": "sampling.batch_prompts or sampling.lanes",
  "score": "student.batch_tokens",
  "judge": "batch_tokens of the teacher",
  "align": "align.microbatch_tokens, or set policy.remat to true",
  "distil": "distil.microbatch_tokens, or set student.remat to true",
  "evaluate": "batch_tokens of the models that score, or align.microbatch_tokens",
  "train": "training.microbatch_tokens, or set model.remat to true",
}


def run(config: Config, progress_of: Callable[[str], Progress]) -> None:
  """Runs every stage that has not committed yet. Killed anywhere and called again, it ends the same.

  `progress_of(stage)` gives a stage its progress display. Raises UserError for wrong input before any device work,
  and for a run folder that holds another configuration or damaged files.
  """
  teacher, judges = check_inputs(config)

  def done(step: Step, manifest: Manifest) -> None:
    if step.stage_name == "evaluate":
      write_metrics(config.run, manifest, step.folder)
      write_report(config.run)

  run_steps(config, list(ts_align(config)), progress_of, lambda: _check_teachers(config.run, teacher, judges), done)


def run_steps(
  config: Config | RewardConfig,
  steps: Sequence[Step],
  progress_of: Callable[[str], Progress],
  ready: Callable[[], None],
  done: Callable[[Step, Manifest], None],
) -> None:
  """Runs those of the steps that have not committed yet, in the configuration's run folder.

  `ready` is called before the first, when what is there has been found sound; `done` after each, also after one that
  had committed before. Raises UserError for a run folder that holds another configuration or damaged files.
  """
  with _locked(config.run), _giving_back():
    manifest, mesh = Manifest(config.run), functools.cache(lambda: make_mesh(**config.mesh.model_dump()))
    _check_config(config, manifest, steps)
    committed = [step for step in steps if step.name in manifest.stages]
    for step in committed:
      manifest.verify(step.name, step.reads)
      _clean(config.run, step)
    ready()
    for step in steps:
      if step not in committed:
        _execute(step, config, mesh, manifest, progress_of(step.name))
        give_back()
      done(step, manifest)


def write_metrics(run: Path, manifest: Manifest, folder: str) -> None:
  """Writes a round's `metrics.json`, and the run's, from what its stages reported."""
  entries = {name.split("/")[1]: entry for name, entry in manifest.stages.items() if name.startswith(folder + "/")}
  prepared = manifest.stages["round_00/prepare"]["counts"]
  metrics = {
    "round": int(folder.removeprefix("round_")),
    **entries["evaluate"]["counts"],
    "pairs": entries["pair"]["counts"]["pairs"],
    "flip_rate": entries["pair"]["counts"]["flip_rate"],
    "student_cut": entries["score"]["counts"]["cut_to_student_limit"],
    "student_scored": entries["score"]["counts"]["scored"],
    "pairs_per_second": {
      "student": entries["score"]["counts"]["pairs_per_second"],
      "teacher": _judging_rate(entries["sample"]["counts"], entries["judge"]["counts"]),
    },
    "dropped": entries["mine"]["counts"]["dropped"] | entries["pair"]["counts"]["dropped"],
    "prompts_dropped": {"training": prepared["train_dropped"], "held-out": prepared["heldout_dropped"]},
    "seconds": {name: round(entry["seconds"], 1) for name, entry in entries.items()},
  }
  write_json(run / folder / "metrics.json", metrics)
  write_json(run / "metrics.json", metrics)


def _judging_rate(*counts: Mapping[str, Any]) -> float | None:
  """Pairs that the teacher judged in a second, in the stages in which it did; None where it had judged all before."""
  work = [each["judging"] for each in counts if "judging" in each]
  pairs, seconds = (sum(each[name] for each in work) for name in ("pairs", "seconds"))
  return pairs / seconds if pairs and seconds else None


def _execute(step: Step, config: Config | RewardConfig, mesh, manifest: Manifest, progress: Progress) -> None:
  """Runs one stage into a folder of its own, moves what it wrote into place, and commits."""
  started = time.monotonic()
  folder, (partial, out) = config.run / step.folder, _workplaces(config.run, step)
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir(parents=True)
  partial.mkdir(exist_ok=True)
  reads = {role: fingerprint(path) for role, path in step.reads.items()}
  _check_same_inputs(step, partial, reads)
  writes = {name: out / file for name, file in step.writes.items()}
  try:
    counts = step.stage(Job(step.name, step.reads, writes, partial, step.options, config, mesh, progress))
  except jax.errors.JaxRuntimeError as error:
    less = MEMORY.get(step.stage_name)
    if "RESOURCE_EXHAUSTED" not in str(error) or not less:
      raise
    raise UserError(f"{step.name}: out of device memory; lower {less}, and give the same command again") from error
  final = {name: folder / file for name, file in step.writes.items()}
  for name, path in writes.items():
    if final[name].is_dir():
      shutil.rmtree(final[name])
    path.replace(final[name])
    make_durable(final[name])
  entry = {
    "reads": reads,
    "writes": {str(path.relative_to(config.run)): fingerprint(path) for path in final.values()},
    "seconds": time.monotonic() - started,  # of the attempt that finished
    "counts": counts,
  }
  manifest.commit(step.name, entry)
  _clean(config.run, step)


def _workplaces(run: Path, step: Step) -> tuple[Path, Path]:
  """Where a stage keeps what it needs to resume, and where it writes before it commits."""
  return run / step.folder / f"{step.stage_name}.partial", run / step.folder / f"{step.stage_name}.out"


def _clean(run: Path, step: Step) -> None:
  for folder in _workplaces(run, step):
    shutil.rmtree(folder, ignore_errors=True)


def _worked(partial: Path) -> bool:
  """Whether a stage has kept anything there that it would go on with."""
  return partial.is_dir() and any(kept.name != INPUTS for kept in partial.iterdir())


def _check_same_inputs(step: Step, partial: Path, reads: dict[str, str]) -> None:
  """A stage that goes on with what it kept does so only from the inputs that it began with."""
  file = partial / INPUTS
  before = json.loads(file.read_text()) if _worked(partial) and file.exists() else reads
  for role, digest in reads.items():
    if before.get(role) != digest:
      path = step.reads[role]
      raise UserError(f"{path}: changed while stage {step.name} was half done; restore it, or start a new run folder")
  write_json(file, reads)


def check_inputs(config: Config) -> tuple[Teacher, dict[str, Teacher]]:
  """The teacher, and further judges by name.

  Raises whatever is wrong with them, models or files, before a device is touched or a file written.
  """
  policy, student = policy_config(config.policy), check_reader(config.student)
  chat = Chat.load(config.policy.path)
  WeightFiles(config.policy.path)
  check_targets(config.align.lora, policy, "align")
  if config.distil:
    check_targets(config.distil.lora, student, "distil")
  longest = config.prompts.max_tokens + config.sampling.max_new_tokens
  if longest > policy.max_tokens:
    raise UserError(
      f"prompts.max_tokens + sampling.max_new_tokens = {longest}, but {config.policy.path} has positions for "
      f"{policy.max_tokens} tokens; lower one of them"
    )
  if config.student.warm_start is None and not student.reward_head:
    raise UserError(f"student.path: {config.student.path} has no reward head; set student.warm_start to train one")
  teacher, judges = build_teacher(config), build_judges(config)
  for name, judge in judges.items():
    if judge.opinions & teacher.opinions:
      raise UserError(
        f"evaluation.judges.{name}: this is the teacher again, or a member of it, who labels the pairs; remove it"
      )
  read_by_student = {}
  for source, readers in ((config.prompts.train, [teacher]), (config.prompts.heldout, [teacher, *judges.values()])):
    prompts = read_prompts(source)
    chat.check(((prompt.id + 1, prompt.messages) for prompt in prompts), source, "the policy")
    for reader in readers:
      reader.validate_prompts(prompts, source)
    read_by_student[source] = [prompt.messages for prompt in prompts]
  if config.distil and config.distil.replay:
    replayed = [pair.prompt for pair in read_preferences(config.distil.replay)]
    if set(map(prompt_key, replayed)) <= set(map(prompt_key, read_by_student[config.prompts.heldout])):
      raise UserError(f"distil.replay: every prompt of {config.distil.replay} is held out; name another file")
    read_by_student[config.distil.replay] = replayed
  if isinstance(student, DecoderConfig):
    reader = Chat.load(config.student.path)
    for source, conversations in read_by_student.items():
      reader.check(enumerate(conversations, 1), source, "the student")
  return teacher, judges


def _check_config(config: Config | RewardConfig, manifest: Manifest, steps: Sequence[Step]) -> None:
  """The run folder's configuration is this one, but for keys that may change; a folder without work gets this one."""
  file = config.run / "config.yaml"
  if manifest.stages or any(_worked(_workplaces(config.run, step)[0]) for step in steps):
    before, now = (yaml.safe_load(dump_config(each)) for each in (load_config(file, schema=type(config)), config))
    evaluated = bool(rounds_done(config.run))
    for key, old, new in changed_keys(before, now):
      if key != "run" and not _may_change(key, old, new, evaluated=evaluated):
        raise UserError(
          f"{key}: this run folder was made with {old!r}, the configuration now says {new!r}; "
          f"put {old!r} back, or choose another run folder than {config.run}"
        )
  else:
    for step in steps:
      _clean(config.run, step)
    (config.run / TEACHERS).unlink(missing_ok=True)
  temporary = file.with_name("config.yaml.tmp")
  temporary.write_text(dump_config(config))
  temporary.replace(file)


def _may_change(key: str, old: Any, new: Any, *, evaluated: bool) -> bool:
  judge = key.startswith(JUDGES)
  *sections, last = key.split(".")[3 if judge else 0 :] or [JUDGES]  # without the name that a judge was given
  if "extra_body" not in sections and (last in FREE or not FREE_SECTIONS.isdisjoint(sections)):
    return True
  if key in GROWING and new >= old:
    return True
  return judge and not evaluated


def _check_teachers(run: Path, teacher: Teacher, judges: Mapping[str, Teacher]) -> None:
  """Teacher and judges are still those that the run began with: they also depend on plugins, templates and our code."""
  file = run / TEACHERS
  now = {"teacher": teacher.identity} | {f"{JUDGES}.{name}": judge.identity for name, judge in judges.items()}
  before = json.loads(file.read_text()) if file.exists() else now
  for key in now if rounds_done(run) else ["teacher"]:
    if before[key] != now[key]:
      raise UserError(
        f"{key}: this run began with {before[key]!r}, which now is {now[key]!r}; put back the plugin, template or "
        f"version of tsalign_jax that changed, or choose another run folder than {run}"
      )
  write_json(file, now)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Holds the run folder: two processes in one folder would overwrite each other."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"{folder}: another process is running in this folder") from error
    yield


@contextlib.contextmanager
def _giving_back() -> Iterator[None]:
  """What compilers leave behind is not kept on top of what programs need."""
  jax.monitoring.register_event_duration_secs_listener(give_back_after_compiling)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(give_back_after_compiling)


def rounds_done(run: Path) -> list[int]:
  """The rounds of a run that have been evaluated."""
  stages = Manifest(run).stages
  return [n for n in range(1, 1000) if f"{round_name(n)}/evaluate" in stages]

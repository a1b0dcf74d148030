"""TS-Align (arXiv 2405.20215): the policy answers, the student picks, the teacher decides, both learn.

A recipe is the list of its stages: what each reads and writes. Nothing happens here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from tsalign_jax.config import ChatTeacher, Config, EnsembleTeacher, Sampling, SomeTeacher
from tsalign_jax.recipes.step import Step, files_of
from tsalign_jax.stages.align import align
from tsalign_jax.stages.distil import distil
from tsalign_jax.stages.evaluate import evaluate
from tsalign_jax.stages.judge import judge
from tsalign_jax.stages.mine import mine
from tsalign_jax.stages.pair import pair
from tsalign_jax.stages.prepare import prepare
from tsalign_jax.stages.sample import sample
from tsalign_jax.stages.score import score


def ts_align(config: Config) -> Iterator[Step]:
  """Every stage of the run in order."""
  run = config.run
  start = run / "round_00"
  train, heldout = start / "train_prompts.parquet", start / "heldout_prompts.parquet"
  files = files_of({"train": config.prompts.train, "heldout": config.prompts.heldout})
  yield Step(
    "round_00/prepare", prepare, files, {"train": "train_prompts.parquet", "heldout": "heldout_prompts.parquet"}
  )
  yield from _warm_start(config, train)
  yield _answer(config, "round_00", heldout, config.policy.path)
  policy, student = config.policy.path, first_student(config)
  for number in range(1, config.rounds + 1):
    yield from _round(config, number, train, heldout, policy, student)
    folder = run / round_name(number)
    policy, student = folder / "policy", _student_after(config, folder, student)


def round_name(number: int) -> str:
  """The folder of a round: "round_01"."""
  return f"round_{number:02d}"


def first_student(config: Config) -> Path:
  """S(0): what the warm start trains, or the student's folder."""
  return config.run / "round_00" / "student" if config.student.warm_start else config.student.path


def _warm_start(config: Config, prompts: Path) -> Iterator[Step]:
  """S(0) from teacher-labelled random pairs of the initial policy's answers."""
  warm = config.student.warm_start
  if warm is None:
    return
  sampling = _with_responses(config.sampling, warm.responses)
  chosen = {"reserved": 0, "start": 0, "count": warm.prompts}
  mining = {"strategy": "random", "pairs": warm.pairs}
  yield _sample(config, "round_00", prompts, config.policy.path, None, mining, {"sampling": sampling, **chosen})
  yield from _label(config, "round_00", prompts, None, mining)
  settings = config.distil.model_copy(update={"epochs": warm.epochs, "replay_share": 0.0, "replay": None})
  yield _distil(config, "round_00", config.student.path, {}, settings)


def _round(config: Config, number: int, train: Path, heldout: Path, policy: Path, student: Path) -> Iterator[Step]:
  name, run, start = round_name(number), config.run, config.run / "round_00"
  folder, warm = run / name, config.student.warm_start
  per_round = config.prompts.per_round
  chosen = {
    "reserved": warm.prompts if warm else 0,
    "start": (number - 1) * (per_round or 0),
    "count": per_round,
  }
  mining = {"strategy": config.mining.strategy, "pairs": 1}
  yield _sample(config, name, train, policy, student, mining, {"sampling": config.sampling, **chosen})
  reads = {"prompts": train, "responses": folder / "responses.parquet", "student": student}
  yield Step(f"{name}/score", score, reads, {"scores": "scores.parquet"})
  yield from _label(config, name, train, folder / "scores.parquet", mining)
  reference = policy if config.align.reference == "previous" else config.policy.path
  reads = {"pairs": folder / "pairs.parquet", "policy": policy, "reference": reference}
  yield Step(f"{name}/align", align, reads, {"policy": "policy", "log": "align.jsonl"})
  earlier = range(0 if warm else 1, number)
  replay = {f"replay_{n:02d}": run / round_name(n) / "pairs.parquet" for n in earlier}
  if config.distil:
    yield _distil(config, name, student, {"heldout": heldout, **replay}, config.distil)
  yield _answer(config, name, heldout, folder / "policy")
  judges = {f"judge_{name}": judge for name, judge in config.evaluation.judges.items()}
  reads = {
    "prompts": heldout,
    "train_prompts": train,
    "responses": folder / "responses.parquet",
    "scores": folder / "scores.parquet",
    "base_answers": start / "answers.parquet",
    "policy_answers": folder / "answers.parquet",
    "student_initial": first_student(config),
    "student_now": _student_after(config, folder, student),
    "policy_initial": config.policy.path,
    **_files({"teacher": config.teacher, **judges}),
  }
  yield Step(f"{name}/evaluate", evaluate, reads, {"comparisons": "comparisons.parquet"})


def _sample(config: Config, name: str, prompts: Path, policy: Path, student: Path | None, mining, options) -> Step:
  """Responses to a round's prompts; a teacher behind a network is asked about those that are complete meanwhile."""
  reads = {"prompts": prompts, "policy": policy}
  if _waits(config.teacher):
    options = options | {"mining": mining}
    if mining["strategy"] == "best_worst":
      reads["student"] = student
  return Step(f"{name}/sample", sample, reads, {"responses": "responses.parquet"}, options)


def _answer(config: Config, name: str, heldout: Path, policy: Path) -> Step:
  """Answers to the held-out prompts: the same stage as `sample`, over all of them."""
  sampling = _with_responses(config.sampling, config.evaluation.samples)
  sampling = sampling.model_copy(update={"temperature": config.evaluation.temperature})
  reads = {"prompts": heldout, "policy": policy}
  return Step(f"{name}/answer", sample, reads, {"responses": "answers.parquet"}, {"sampling": sampling})


def _with_responses(sampling: Sampling, responses: int) -> Sampling:
  """Another number of responses a prompt, with as many branches in a batch as before."""
  prompts = max(1, sampling.batch_prompts * sampling.responses // responses)
  return sampling.model_copy(update={"responses": responses, "batch_prompts": prompts})


def _label(config: Config, name: str, prompts: Path, scores: Path | None, options) -> Iterator[Step]:
  """Candidates, verdicts and pairs of a round's responses."""
  folder = config.run / name
  responses, candidates = folder / "responses.parquet", folder / "candidates.parquet"
  reads = {"responses": responses} | ({"scores": scores} if scores else {})
  yield Step(f"{name}/mine", mine, reads, {"candidates": "candidates.parquet"}, options)
  reads = {"prompts": prompts, "responses": responses, "candidates": candidates}
  yield Step(f"{name}/judge", judge, reads | _files({"teacher": config.teacher}), {"verdicts": "verdicts.parquet"})
  yield Step(f"{name}/pair", pair, reads | {"verdicts": folder / "verdicts.parquet"}, {"pairs": "pairs.parquet"})


def _distil(config: Config, name: str, student: Path, others: Mapping[str, Path], settings) -> Step:
  reads = {
    "pairs": config.run / name / "pairs.parquet",
    "student": student,
    **others,
    **files_of({"human": settings.replay}),
  }
  return Step(f"{name}/distil", distil, reads, {"student": "student", "log": "distil.jsonl"}, {"settings": settings})


def _files(teachers: Mapping[str, SomeTeacher]) -> dict[str, Path]:
  """Files and models' folders that the verdicts of these teachers depend on."""
  return files_of({f"{name}_{n}": file for name, each in teachers.items() for n, file in enumerate(each.sources())})


def _waits(teacher: SomeTeacher) -> bool:
  """Whether a teacher, or a member of it, waits for a network."""
  members = teacher.members if isinstance(teacher, EnsembleTeacher) else (teacher,)
  return any(isinstance(member, ChatTeacher) for member in members)


def _student_after(config: Config, folder: Path, student: Path) -> Path:
  """The student that a round leaves behind: what it distilled, or else the one that it began with."""
  return folder / "student" if config.distil else student

"""How good the student is, asked of the teacher: accuracy, calibration, and what its picks cost."""

from collections.abc import Iterable

import numpy as np

from tsalign_jax.data.tables import Rows, by_prompt, read_table, to_prompt
from tsalign_jax.pairing.mine import best_worst, random_pairs
from tsalign_jax.pairing.statistics import Accuracy, accuracy, calibration, regret
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.seeding import derived_seed
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.stages.mine import minable
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.types import CandidatePair, Verdict

RANDOM_PAIRS = 4  # a held-out prompt, for the student's accuracy and calibration

Choices = list[list[tuple[int, int]]]  # for each prompt, pairs of responses by index


def student_quality(job: Job, teacher: Teacher, prompts: dict[int, dict], answers: dict[int, Rows]) -> Counts:
  """How often the first student and the one of this round order held-out answers as the teacher does.

  On random pairs, which are the same for both students, with their calibration there; and on mined ones, which are
  each student's own best and worst of the same answers: as shares with intervals over prompts, and of how many pairs
  the teacher decided. On some of the prompts; nothing where that is none.
  """
  prompts = {i: prompts[i] for i in _some(job, "student", prompts, job.config.evaluation.student_prompts)}
  if not prompts:
    return {}
  engine = build_reward_engine(job.student(), job.mesh, job.config.student)
  texts = {i: list(dict.fromkeys(row["text"] for row in rows)) for i, rows in answers.items() if i in prompts}
  texts = {i: choices for i, choices in texts.items() if len(choices) > 1}
  items = [engine.encode(prompts[i]["prompt"], choices) for i, choices in texts.items()]

  def verdicts(pairs: Choices) -> list[Verdict]:
    candidates = [
      CandidatePair(to_prompt(prompts[i]), choices[first], choices[second])
      for (i, choices), of_prompt in zip(texts.items(), pairs, strict=True)
      for first, second in of_prompt
    ]
    return [judgement.verdict for judgement in teacher.judge(candidates)]

  random = [random_pairs(range(len(texts[i])), RANDOM_PAIRS, (job.config.seed, i)) for i in texts]
  on_random = verdicts(random)
  out: Counts = {
    f"student_{name}": {}
    for name in ("accuracy_mined", "accuracy_mined_ci", "accuracy_random", "accuracy_random_ci", "pairs", "calibration")
  }
  for name in ("initial", "now"):
    scores = dict(engine.score(job.load(engine.model, job.reads[f"student_{name}"]), items))
    mined = [best_worst(range(len(scores[n])), scores[n], min_margin=0.0) for n in range(len(items))]
    mined = [[] if isinstance(found, str) else [(found.first, found.second)] for found in mined]
    out["student_pairs"][name] = {}
    for kind, pairs, judged in (("mined", mined, verdicts(mined)), ("random", random, on_random)):
      right = _accuracy(job, _margins(scores, pairs), judged, pairs)
      out[f"student_accuracy_{kind}"][name], out[f"student_accuracy_{kind}_ci"][name] = right.share, right.interval
      out["student_pairs"][name][kind] = right.pairs
    found = calibration(_margins(scores, random), on_random)
    out["student_calibration"][name] = {"error": found.error, "bins": [each._asdict() for each in found.bins]}
  return out


def student_regret(job: Job, teacher: Teacher) -> Counts:
  """What the picks of the student that scored this round's responses cost, by the teacher's scores of all of them.

  Of those that mining may pick, that is. On some of the round's prompts that mining can use; nothing from a teacher
  that gives no scores.
  """
  prompts = {row["prompt_id"]: to_prompt(row) for row in read_table(job.reads["train_prompts"])}
  responses, scores = (by_prompt(read_table(job.reads[name])) for name in ("responses", "scores"))
  kept = {i: minable(job.config.mining, rows) for i, rows in responses.items()}
  kept = {i: indices for i, indices in kept.items() if not isinstance(indices, str)}
  chosen = _some(job, "regret", kept, job.config.evaluation.regret_prompts)
  found = teacher.scores([(prompts[i], [responses[i][k]["text"] for k in kept[i]]) for i in chosen]) if chosen else None
  if found is None:
    return {}
  picks = [int(np.argmax([scores[i][k]["score"] for k in kept[i]])) for i in chosen]
  return {"student_regret": regret(picks, [np.asarray(each) for each in found])._asdict()}


def _some(job: Job, purpose: str, prompts: Iterable[int], most: int) -> list[int]:
  """At most so many of these prompts, drawn for this purpose."""
  return sorted(prompts, key=lambda i: (derived_seed(job.config.seed, purpose, i), i))[:most]


def _accuracy(job: Job, margins: list[float], verdicts: list[Verdict], pairs: Choices) -> Accuracy:
  judged = iter(zip(margins, verdicts, strict=True))
  by_prompt = [[next(judged) for _ in of_prompt] for of_prompt in pairs]
  return accuracy(by_prompt, resamples=job.config.evaluation.resamples, seed=job.config.seed)


def _margins(scores: dict[int, list[float]], pairs: Choices) -> list[float]:
  return [scores[n][first] - scores[n][second] for n, of_prompt in enumerate(pairs) for first, second in of_prompt]

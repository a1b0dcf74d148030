"""evaluate: is the policy better than the one the run started from, and does the student see what the teacher sees?"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tsalign_jax.data.packing import Item, Packing
from tsalign_jax.data.tables import COMPARISONS, Rows, by_prompt, read_table, to_prompt, write_table
from tsalign_jax.pairing.statistics import bootstrap_interval, win_rate
from tsalign_jax.parallel.mesh import batch_ways
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.stages.diagnose import student_quality, student_regret
from tsalign_jax.teachers.base import Teacher
from tsalign_jax.teachers.build import build_judges, build_teacher
from tsalign_jax.teachers.statistics import check_answered
from tsalign_jax.training.align import build_reference, known_logps
from tsalign_jax.types import CandidatePair, Judgement, Verdict

Answers = Sequence[tuple[int, dict, dict]]  # prompt id, the policy's answer, the base policy's


def evaluate(job: Job) -> Counts:
  """Writes `comparisons` (every base and policy answer side by side) and returns the metrics of the round."""
  prompts = {row["prompt_id"]: row for row in read_table(job.reads["prompts"], used_only=True)}
  base, policy = (by_prompt(read_table(job.reads[name])) for name in ("base_answers", "policy_answers"))
  rows = [(i, ours, theirs) for i in prompts for ours, theirs in zip(policy[i], base[i], strict=True)]
  judges = build_judges(job.config)
  with job.progress(4 + len(judges), "parts") as advance:
    with build_teacher(job.config) as teacher:
      judged = _judged(prompts, rows, teacher, f"{job.name}: the teacher")
      metrics: Counts = {"heldout_prompts": len(prompts), **_outcome(job, rows, judged)}
      advance(1, f"win rate {metrics['win_rate']:.1%}")
      metrics |= student_quality(job, teacher, prompts, {i: [*base[i], *policy[i]] for i in prompts})
      metrics |= student_regret(job, teacher)
      advance(2, "")
    others: dict[str, Sequence[Judgement]] = {}
    for name, judge in judges.items():
      with judge:
        others[name] = _judged(prompts, rows, judge, f"{job.name}: evaluation.judges.{name}")
      advance(1, f"by {name}")
    metrics["judges"] = {name: _outcome(job, rows, judgements) for name, judgements in others.items()}
    table = [
      _comparison(prompts, *row, judgement, {name: judgements[n].verdict for name, judgements in others.items()})
      for n, (row, judgement) in enumerate(zip(rows, judged, strict=True))
    ]
    write_table(job.writes["comparisons"], table, COMPARISONS)
    metrics |= {f"mean_length_{name}": _mean_length(answers) for name, answers in (("base", base), ("policy", policy))}
    metrics["kl_from_initial"] = _kl(job, prompts, policy)
    advance(1, "")
  return metrics


def _judged(prompts: Mapping[int, dict], rows: Answers, judge: Teacher, who: str) -> Sequence[Judgement]:
  pairs = [CandidatePair(to_prompt(prompts[i]), ours["text"], theirs["text"]) for i, ours, theirs in rows]
  judged = judge.judge(pairs)
  check_answered(judged, who)
  return judged


def _outcome(job: Job, rows: Answers, judged: Sequence[Judgement]) -> Counts:
  """What a judge of the j-th answers of both to each prompt found; the interval resamples prompts."""
  verdicts: dict[int, list[Verdict]] = {}
  for (i, *_), judgement in zip(rows, judged, strict=True):
    verdicts.setdefault(i, []).append(judgement.verdict)
  per_prompt = list(verdicts.values())
  count = Counter(verdict for row in per_prompt for verdict in row)
  resamples = job.config.evaluation.resamples
  return {
    "win_rate": win_rate(per_prompt),
    "win_rate_ci": bootstrap_interval(per_prompt, resamples=resamples, seed=job.config.seed),
    "wins": count[Verdict.FIRST],
    "ties": count[Verdict.TIE],
    "losses": count[Verdict.SECOND],
    "undecided": count[Verdict.ERROR] + count[Verdict.INCONSISTENT],
  }


def _mean_length(answers: Mapping[int, Rows]) -> float:
  return float(np.mean([len(row["tokens"]) for rows in answers.values() for row in rows]))


def _comparison(
  prompts, prompt_id: int, ours: dict, theirs: dict, judgement: Judgement, others: Mapping[str, Verdict]
) -> dict:
  return {
    "prompt_id": prompt_id,
    "response_id": ours["response_id"],
    "prompt": prompts[prompt_id]["prompt"],
    "base": theirs["text"],
    "policy": ours["text"],
    "verdict": judgement.verdict,
    "evidence": json.dumps(judgement.evidence),
    "others": json.dumps(others),
  }


def _kl(job: Job, prompts: dict[int, dict], policy: dict[int, Rows]) -> float:
  """KL(policy || initial) in nats a response: the mean of log(policy/initial) over the policy's own answers.

  Unbiased where answers are sampled at temperature 1 without filters; otherwise it is only an indication.
  """
  model = job.policy()
  program, params = build_reference(model, job.mesh), job.load(model, job.reads["policy_initial"])
  items = [Item(prompts[i]["tokens"], [row["tokens"] for row in policy[i]]) for i in prompts]
  sampled = np.asarray([[row["logprob"] for row in policy[i]] for i in prompts])
  packing = Packing(items, len(items), job.config.align.microbatch_tokens, batch_ways(job.mesh))
  return float(np.mean(sampled - known_logps(program, params, packing, [range(len(items))], job.mesh)))

"""judge: the teacher's verdict on each candidate pair."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from tsalign_jax.data.tables import VERDICTS, Rows, read_table, to_prompt, write_table
from tsalign_jax.parallel.mesh import pipelined
from tsalign_jax.stages.base import Counts, Job, Pace, gathered, shards
from tsalign_jax.teachers.base import Work
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.teachers.statistics import Judged, check_answered, statistics
from tsalign_jax.types import CandidatePair, Verdict

BATCH = 64  # pairs whose verdicts are written together
IN_FLIGHT = 8  # batches that a teacher behind a network is asked about at once, so that none waits for a slow answer


def judge(job: Job) -> Counts:
  """Writes `verdicts` for the candidates that were not dropped."""
  prompts = {row["prompt_id"]: to_prompt(row) for row in read_table(job.reads["prompts"])}
  texts = {(row["prompt_id"], row["response_id"]): row["text"] for row in read_table(job.reads["responses"])}
  candidates = read_table(job.reads["candidates"], used_only=True)
  groups = [candidates[start : start + BATCH] for start in range(0, len(candidates), BATCH)]
  _forget_failures(job)
  pace, missing = Pace(), list(shards(job, len(groups)))
  with build_teacher(job.config) as teacher, job.progress(len(candidates), "pairs") as advance:

    def submitted() -> Iterator[tuple[Rows, Path, Future]]:
      for index, file in missing:
        pairs = [CandidatePair(prompts[row["prompt_id"]], *_texts(texts, row)) for row in groups[index]]
        with pace.of(len(pairs)):
          future = teacher.submit(pairs)
        yield groups[index], file, future

    advance(len(candidates) - sum(len(groups[index]) for index, _ in missing), earlier=True)
    for group, file, future in pipelined(submitted(), IN_FLIGHT if teacher.remote else 1):
      write_table(file, _rows(group, future.result()), VERDICTS)
      advance(len(group), teacher.note())
    work = teacher.worked() or Work(pace.done, pace.seconds)
  table = gathered(job)
  judged = [Judged(*_texts(texts, row), Verdict(row["verdict"]), json.loads(row["evidence"])) for row in table]
  check_answered(judged, f"{job.name}: the teacher")
  write_table(job.writes["verdicts"], table, VERDICTS)
  verdicts = dict(sorted(Counter(row["verdict"] for row in table).items()))
  shares = statistics(judged).shares()
  return {"teacher": teacher.identity, "verdicts": verdicts, "judging": work._asdict(), **shares}


def _forget_failures(job: Job) -> None:
  """Removes the parts in which an earlier attempt failed, so that what failed is tried again; answers are stored."""
  for file in job.partial.glob("*.parquet"):
    if any(row["verdict"] == Verdict.ERROR for row in read_table(file)):
      file.unlink()


def _texts(texts: dict[tuple[int, int], str], row: dict) -> tuple[str, str]:
  return texts[row["prompt_id"], row["first"]], texts[row["prompt_id"], row["second"]]


def _rows(candidates: Rows, judgements) -> Rows:
  return [
    {
      "prompt_id": row["prompt_id"],
      "first": row["first"],
      "second": row["second"],
      "verdict": judgement.verdict,
      "probability": judgement.probability,
      "evidence": json.dumps(judgement.evidence),
    }
    for row, judgement in zip(candidates, judgements, strict=True)
  ]

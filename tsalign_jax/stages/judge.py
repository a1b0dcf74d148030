"""judge: the teacher's verdict on each candidate pair."""

import json
from collections import Counter

from tsalign_jax.data.tables import VERDICTS, Rows, read_table, to_prompt, write_table
from tsalign_jax.stages.base import Counts, Job, Pace, gathered, shards
from tsalign_jax.teachers.base import Work
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.teachers.statistics import Judged, statistics
from tsalign_jax.types import CandidatePair, Verdict

BATCH = 64  # pairs; each batch of verdicts is on disk before the next is asked for


def judge(job: Job) -> Counts:
  """Writes `verdicts` for the candidates that were not dropped."""
  prompts = {row["prompt_id"]: to_prompt(row) for row in read_table(job.reads["prompts"])}
  texts = {(row["prompt_id"], row["response_id"]): row["text"] for row in read_table(job.reads["responses"])}
  candidates = read_table(job.reads["candidates"], used_only=True)
  groups = [candidates[start : start + BATCH] for start in range(0, len(candidates), BATCH)]
  _forget_failures(job)
  pace = Pace()
  with build_teacher(job.config) as teacher, job.progress(len(candidates), "pairs") as advance:
    for index, file in shards(job, len(groups)):
      pairs = [CandidatePair(prompts[row["prompt_id"]], *_texts(texts, row)) for row in groups[index]]
      with pace.of(len(pairs)):
        judged = teacher.judge(pairs)
      write_table(file, _rows(groups[index], judged), VERDICTS)
      advance(len(pairs), teacher.note())
    work = teacher.worked() or Work(pace.done, pace.seconds)
  table = gathered(job)
  write_table(job.writes["verdicts"], table, VERDICTS)
  judged = [Judged(*_texts(texts, row), Verdict(row["verdict"]), json.loads(row["evidence"])) for row in table]
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

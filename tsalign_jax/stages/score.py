"""score: the student's score of every response."""

from tsalign_jax.data.tables import SCORES, by_prompt, read_table, write_table
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.stages.base import Counts, Job, Pace


def score(job: Job) -> Counts:
  """Writes `scores` for `responses`; seconds of work, so it is done whole or not at all."""
  prompts = {row["prompt_id"]: row["prompt"] for row in read_table(job.reads["prompts"])}
  responses = by_prompt(read_table(job.reads["responses"]))
  model = job.student()
  engine = build_reward_engine(model, job.mesh, job.config.student)
  items = [engine.encode(prompts[i], [row["text"] for row in rows]) for i, rows in responses.items()]
  params, ids, table = job.load(model, job.reads["student"]), list(responses), []
  pace, total = Pace(), sum(len(rows) for rows in responses.values())
  with job.progress(total, "responses") as advance, pace.of(total / 2):
    for index, scores in engine.score(params, items):
      rows = responses[ids[index]]
      table += [
        {"prompt_id": ids[index], "response_id": row["response_id"], "score": value}
        for row, value in zip(rows, scores, strict=True)
      ]
      advance(len(rows), "")
  table.sort(key=lambda row: (row["prompt_id"], row["response_id"]))
  write_table(job.writes["scores"], table, SCORES)
  cut = sum(sum(item.cut) for item in items)
  return {"scored": len(table), "cut_to_student_limit": cut, "pairs_per_second": pace.per_second}

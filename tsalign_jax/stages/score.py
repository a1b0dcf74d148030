"""score: the student's score of every response."""

from collections.abc import Iterator, Mapping

from tsalign_jax.data.tables import SCORES, Rows, by_prompt, read_table, write_table
from tsalign_jax.models.functional import Params
from tsalign_jax.scoring.reward import RewardEngine, build_reward_engine
from tsalign_jax.stages.base import Counts, Job, Pace
from tsalign_jax.types import Conversation


def score(job: Job) -> Counts:
  """Writes `scores` for `responses`; seconds of work, so it is done whole or not at all."""
  prompts = {row["prompt_id"]: row["prompt"] for row in read_table(job.reads["prompts"])}
  responses = by_prompt(read_table(job.reads["responses"]))
  model = job.student()
  engine = build_reward_engine(model, job.mesh, job.config.student)
  params, table, cut = job.load(model, job.reads["student"]), [], 0
  pace, total = Pace(), sum(map(len, responses.values()))
  with job.progress(total, "responses") as advance, pace.of(total / 2):
    for rows, shortened in scored(engine, params, prompts, responses):
      table += rows
      cut += shortened
      advance(len(rows), "")
  table.sort(key=lambda row: (row["prompt_id"], row["response_id"]))
  write_table(job.writes["scores"], table, SCORES)
  return {"scored": len(table), "cut_to_student_limit": cut, "pairs_per_second": pace.per_second}


def scored(
  engine: RewardEngine, params: Params, prompts: Mapping[int, Conversation], responses: Mapping[int, Rows]
) -> Iterator[tuple[Rows, int]]:
  """Rows of scores for all responses to a prompt, and how many of these had to be cut, prompt by prompt."""
  ids = list(responses)
  items = [engine.encode(prompts[i], [row["text"] for row in responses[i]]) for i in ids]
  for index, scores in engine.score(params, items):
    pairs = zip(responses[ids[index]], scores, strict=True)
    rows = [{"prompt_id": ids[index], "response_id": row["response_id"], "score": value} for row, value in pairs]
    yield rows, sum(items[index].cut)

"""sample: K responses of a policy to each prompt, on policy; also the answers that evaluation compares."""

from tsalign_jax.config import Sampling
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.tables import RESPONSES, Rows, read_table, write_table
from tsalign_jax.sampling.engine import Sampled, build_sampler
from tsalign_jax.seeding import derived_seed
from tsalign_jax.stages.ahead import judging_ahead
from tsalign_jax.stages.base import Counts, Job, gathered, new_shards
from tsalign_jax.types import Rollout, UserError


def sample(job: Job) -> Counts:
  """Writes `responses`. Prompts are saved as they are completed, so a restart samples only what is missing.

  Options: `sampling`, and `start` and `count` for a slice of the prompts in the run's shuffled order, behind the first
  `reserved` of it (all of them in file order without). With `mining`, the options of the stage `mine`, a teacher behind
  a network judges ahead.
  """
  sampling: Sampling = job.options["sampling"]
  prompts = {row["prompt_id"]: row for row in select(job)}
  chat, model, mesh = Chat.load(job.config.policy.path), job.policy(), job.sampling_mesh
  sampler = build_sampler(model, mesh, sampling, chat.stop_tokens)
  done = {row["prompt_id"] for row in gathered(job)}
  params = job.load(model.for_inference, job.reads["policy"], mesh) if len(done) < len(prompts) else {}
  tokens = [(i, row["tokens"]) for i, row in prompts.items()]
  with job.progress(len(prompts) * sampling.responses, "responses") as advance, judging_ahead(job, prompts) as ahead:
    advance(len(done) * sampling.responses, earlier=True)
    for file, harvest in zip(new_shards(job), sampler.run(params, tokens, job.key, done), strict=False):
      write_table(file, rows := _rows(harvest, chat), RESPONSES)
      if ahead:
        ahead.tell(rows)
      advance(len(harvest) * sampling.responses, ahead.note() if ahead else "")
    judging = ahead.worked() if ahead else None
  rows = sorted(gathered(job), key=lambda row: (row["prompt_id"], row["response_id"]))
  expected = sorted((i, k) for i in prompts for k in range(sampling.responses))
  if [(row["prompt_id"], row["response_id"]) for row in rows] != expected:
    raise UserError(f"{job.partial}: its shards are not those of this stage's prompts; delete the folder")
  write_table(job.writes["responses"], rows, RESPONSES)
  sampled = sum(len(row["tokens"]) for row in rows)
  counts = {"prompts": len(prompts), "responses": len(rows), "tokens": sampled}
  return counts | ({"judging": judging._asdict()} if judging else {})


def select(job: Job) -> Rows:
  """The prompts of this stage: a slice of the shuffled order, which starts over where it ends."""
  rows = read_table(job.reads["prompts"], used_only=True)
  if "start" not in job.options:
    return rows
  return take(rows, job.config.seed, job.options["reserved"], job.options["start"], job.options["count"])


def take(rows: Rows, seed: int, reserved: int, start: int, count: int | None) -> Rows:
  """`count` rows from `start` on, in an order that a hash of seed and id gives; without the first `reserved`.

  The order starts over where it ends; a prompt more or less does not change the order of the others.
  """
  order = sorted(rows, key=lambda row: (derived_seed(seed, "prompt", row["prompt_id"]), row["prompt_id"]))
  pool = order[reserved:]
  count = len(pool) if count is None else min(count, len(pool))
  return [pool[(start + offset) % len(pool)] for offset in range(count)]


def _rows(harvest: list[tuple[int, list[Sampled]]], chat: Chat) -> Rows:
  rollouts = [
    Rollout(prompt_id, k, sampled.tokens, chat.text(sampled.tokens), sampled.logprob, sampled.finish)
    for prompt_id, branches in harvest
    for k, sampled in enumerate(branches)
  ]
  return [rollout._asdict() for rollout in rollouts]

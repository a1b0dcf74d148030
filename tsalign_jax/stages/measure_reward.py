"""evaluate: how often a trained reward model orders held-out pairs as they are labelled, beside "longer wins"."""

import numpy as np

from tsalign_jax.config import RewardConfig
from tsalign_jax.data.files import prompt_key, read_preferences
from tsalign_jax.data.tables import REWARD_SCORES, write_table
from tsalign_jax.models.loading import reward_model
from tsalign_jax.pairing.statistics import bootstrap_interval, sign, win_rate
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.types import PreferencePair


def measure_reward(job: Job) -> Counts:
  """Writes `scores` of the held-out pairs by the model as it was written, and returns what they say of it.

  Pairs longer than the model reads are cut, as in its later use, and counted: every model is measured on all pairs.
  Pairs of equal responses have no answer and are left out, and counted.
  """
  config: RewardConfig = job.config
  settings = config.model.model_copy(update={"path": job.reads["model"]})
  model = reward_model(settings)
  engine, params = build_reward_engine(model, job.mesh, settings), model.load(job.mesh)
  everything = list(enumerate(read_preferences(config.pairs.heldout)))
  pairs = {row: pair for row, pair in everything if pair.chosen != pair.rejected}
  items = [engine.encode(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs.values()]
  scores: dict[int, list[float]] = {}
  with job.progress(len(items), "pairs") as advance:
    for index, both in engine.score(params, items):
      scores[index] = both
      advance(1, "")
  table = [_row(row, pair, scores[index], any(items[index].cut)) for index, (row, pair) in enumerate(pairs.items())]
  write_table(job.writes["scores"], table, REWARD_SCORES)
  margins = [row["chosen_score"] - row["rejected_score"] for row in table]
  longer = [row["chosen_length"] - row["rejected_length"] for row in table]
  prompts = [prompt_key(pair.prompt) for pair in pairs.values()]
  return {
    "heldout_pairs": len(pairs),
    "heldout_cut": sum(row["cut"] for row in table),
    "heldout_equal": len(everything) - len(pairs),
    **_share("accuracy", margins, prompts, config),
    **_share("longer_wins", longer, prompts, config),
    "loss": float(np.mean(np.logaddexp(0.0, -np.asarray(margins)))),
    "margin": float(np.mean(margins)),
    "mean_reward": float(np.mean([[row["chosen_score"], row["rejected_score"]] for row in table])),
  }


def _row(row: int, pair: PreferencePair, scores: list[float], cut: bool) -> dict:
  lengths = {"chosen_length": len(pair.chosen), "rejected_length": len(pair.rejected)}
  return {"row": row, "chosen_score": scores[0], "rejected_score": scores[1], **lengths, "cut": cut}


def _share(name: str, margins: list[float], prompts: list[str], config: RewardConfig) -> Counts:
  """How often the margin is in favour of the chosen response (0 counts half), with its interval over prompts."""
  groups: dict[str, list] = {}
  for margin, prompt in zip(margins, prompts, strict=True):
    groups.setdefault(prompt, []).append(sign(margin))
  verdicts = list(groups.values())
  interval = bootstrap_interval(verdicts, resamples=config.resamples, seed=config.seed)
  return {name: win_rate(verdicts), f"{name}_ci": interval}

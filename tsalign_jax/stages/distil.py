"""distil: the student learns from the teacher's verdicts, mixed with pairs that it has seen before."""

import shutil

import numpy as np

from tsalign_jax.config import Distil
from tsalign_jax.data.files import prompt_key, read_preferences
from tsalign_jax.data.tables import read_table
from tsalign_jax.models.checkpoints import save_tree
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.training.reward import fit, make_example
from tsalign_jax.training.run import training_steps
from tsalign_jax.types import PreferencePair


def distil(job: Job) -> Counts:
  """Writes the next student and the log of its training.

  Options: `settings`, the optimizer and loss. Reads `pairs`, the new ones, and any number of `replay_*` tables.
  """
  settings: Distil = job.options["settings"]
  model = job.student()
  engine = build_reward_engine(model, job.mesh, job.config.student)
  new = read_pairs(job.reads["pairs"])
  pairs = [*new, *_replayed(job, len(new), settings)]
  examples = [make_example(engine, pair) for pair in pairs]
  steps = training_steps(len(examples), settings)
  with job.progress(steps, "steps") as advance:
    trained = fit(
      engine,
      examples,
      settings,
      lambda: job.load(model, job.reads["student"]),
      seed=job.seed,
      folder=job.partial,
      on_step=lambda _, metrics: advance(1, f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.2f}"),
    )
  save_tree(job.writes["student"], trained)
  shutil.copyfile(job.partial / "log.jsonl", job.writes["log"])
  return {"new_pairs": len(new), "replayed_pairs": len(pairs) - len(new), "steps": steps}


def read_pairs(file) -> list[PreferencePair]:
  """The preference pairs of a `pairs` table, as text."""
  return [
    PreferencePair(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
    for row in read_table(file)
  ]


def _replayed(job: Job, new: int, settings: Distil) -> list[PreferencePair]:
  """As many earlier and human pairs as make up the replay share; each is used once before any is used twice.

  No pair of a prompt on which the student is measured.
  """
  pool = [pair for name, file in sorted(job.reads.items()) if name.startswith("replay_") for pair in read_pairs(file)]
  if settings.replay:
    heldout = {prompt_key(row["prompt"]) for row in read_table(job.reads["heldout"])}
    pool += [pair for pair in read_preferences(settings.replay) if prompt_key(pair.prompt) not in heldout]
  if not pool:
    return []
  wanted = round(new * settings.replay_share / (1 - settings.replay_share))
  random = np.random.default_rng(job.seed)
  order = np.concatenate([random.permutation(len(pool)) for _ in range(-(-wanted // len(pool)))] or [np.zeros(0, int)])
  return [pool[index] for index in order[:wanted]]

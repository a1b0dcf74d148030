"""distil: the student learns from the teacher's verdicts, mixed with pairs that it has seen before."""

import functools
import itertools
import shutil
from pathlib import Path

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
  earlier = [file for name, file in sorted(job.reads.items()) if name.startswith("replay_")]
  human, left_out = human_pairs(settings.replay, job.reads["heldout"]) if settings.replay else ([], 0)
  own = [pair for file in earlier for pair in read_pairs(file)]
  seen = [*own, *human]
  chosen = _replayed(len(seen), len(new), settings.replay_share, job.seed)
  examples = [make_example(engine, pair) for pair in (*new, *(seen[index] for index in chosen))]
  steps = training_steps(len(examples), settings)
  with job.progress(steps, "steps") as advance:
    trained = fit(
      engine,
      examples,
      settings,
      lambda: job.load(model, job.reads["student"]),
      section="distil",
      seed=job.seed,
      folder=job.partial,
      on_step=lambda _, metrics: advance(1, f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.2f}"),
      on_resume=functools.partial(advance, earlier=True),
    )
  save_tree(job.writes["student"], trained)
  shutil.copyfile(job.partial / "log.jsonl", job.writes["log"])
  return {
    "new_pairs": len(new),
    "replayed_pairs": len(chosen),
    "replayed_human_pairs": sum(index >= len(own) for index in chosen),
    "human_pairs_held_out": left_out,
    "cut_to_student_limit": sum(any(example.item.cut) for example in examples),
    "steps": steps,
  }


def read_pairs(file) -> list[PreferencePair]:
  """The preference pairs of a `pairs` table, as text."""
  return [
    PreferencePair(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
    for row in read_table(file)
  ]


def human_pairs(source: str, heldout: Path) -> tuple[list[PreferencePair], int]:
  """Human preferences without those of prompts on which the student is measured, and how many these were."""
  measured = {prompt_key(row["prompt"]) for row in read_table(heldout)}
  pairs = read_preferences(source)
  kept = [pair for pair in pairs if prompt_key(pair.prompt) not in measured]
  return kept, len(pairs) - len(kept)


def _replayed(seen: int, new: int, share: float, seed: int) -> list[int]:
  """Indices of as many pairs as make up the replay share; each is used once before any is used twice."""
  if not seen:
    return []
  wanted, random = round(new * share / (1 - share)), np.random.default_rng(seed)
  passes = [random.permutation(seen) for _ in range(-(-wanted // seen))]
  return [int(index) for index in itertools.chain(*passes)][:wanted]

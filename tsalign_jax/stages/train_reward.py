"""train: a reward model learns from preference pairs, and is written as a Hugging Face folder."""

import functools
import shutil
from collections import Counter

from tsalign_jax.config import RewardConfig
from tsalign_jax.data.files import HELD_OUT, prompt_key, read_preferences
from tsalign_jax.models.hf import save_params
from tsalign_jax.models.loading import reward_model
from tsalign_jax.scoring.reward import RewardEngine, build_reward_engine
from tsalign_jax.stages.base import Counts, Job, in_words
from tsalign_jax.training.reward import Example, fit, left_out_accuracy, make_example, probed
from tsalign_jax.training.run import training_steps
from tsalign_jax.types import UserError

EQUAL = "chosen and rejected are equal"
PROBE = "probe.npz"


def train_reward(job: Job) -> Counts:
  """Writes `model`, which transformers and this project load, and the log of its training.

  Raises UserError when no pair is left to learn from.
  """
  config: RewardConfig = job.config
  model, settings = reward_model(config.model), config.training
  engine = build_reward_engine(model, job.mesh, config.model, config.model.chat_template)
  examples, dropped = usable_pairs(engine, config)
  if not examples:
    raise UserError(
      f"pairs.train: no pair is left to learn from ({in_words(dropped)}); raise model.max_tokens, or give others"
    )
  steps = training_steps(len(examples), settings)
  with job.progress(steps, "steps") as advance:
    advance(0, f"{dropped.total()} of {len(examples) + dropped.total()} pairs dropped")

    def probing(pairs: int) -> None:
      advance(0, f"the head alone: {pairs} of {len(examples)} pairs read")

    def start():
      params = job.load(model, job.reads["model"])
      if not config.probe:
        return params
      return probed(engine, params, examples, settings.microbatch_tokens, job.partial / PROBE, probing)

    params = fit(
      engine,
      examples,
      settings,
      start,
      section="training",
      seed=job.seed,
      folder=job.partial,
      on_step=lambda _, metrics: advance(1, f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.2f}"),
      on_resume=functools.partial(advance, earlier=True),
    )
  written = {"dtype": model.param_dtype, "chat_template": config.model.chat_template}
  save_params(params, model.skeleton, model.config, model.folder, job.writes["model"], **written)
  shutil.copyfile(job.partial / "log.jsonl", job.writes["log"])
  found = {"probe_accuracy": left_out_accuracy(job.partial / PROBE)} if config.probe else {}
  return {"train_pairs": len(examples), "dropped": dict(sorted(dropped.items())), "steps": steps, **found}


def usable_pairs(engine: RewardEngine, config: RewardConfig) -> tuple[list[Example], Counter[str]]:
  """The training pairs that can be learned from, and why how many others cannot."""
  heldout = {prompt_key(pair.prompt) for pair in read_preferences(config.pairs.heldout)}
  examples, dropped = [], Counter()
  for source in config.pairs.train:
    for pair in read_preferences(source, margin=config.pairs.margin):
      if pair.chosen == pair.rejected:
        dropped[EQUAL] += 1
      elif prompt_key(pair.prompt) in heldout:
        dropped[HELD_OUT] += 1
      elif any((example := make_example(engine, pair)).item.cut):
        dropped[f"longer than {engine.limit} tokens"] += 1
      else:
        examples.append(example)
  return examples, dropped

"""`tsalign train-reward`: the training of a reward model as a run that can be stopped and continued."""

from collections.abc import Callable
from pathlib import Path

from tsalign_jax.config import RewardConfig
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import read_preferences
from tsalign_jax.loop import run_steps
from tsalign_jax.manifest import Manifest, write_json
from tsalign_jax.models.config import DecoderConfig
from tsalign_jax.models.lora import check_targets
from tsalign_jax.recipes.step import Step
from tsalign_jax.recipes.train_reward import train_reward_steps
from tsalign_jax.scoring.reward import check_reader
from tsalign_jax.stages.base import Progress
from tsalign_jax.types import UserError


def train_reward(config: RewardConfig, progress_of: Callable[[str], Progress]) -> None:
  """Trains and measures the model. Killed anywhere and called again, it ends the same.

  Raises UserError for wrong input before any device work, and for a run folder that holds another configuration.
  """
  _check_inputs(config)

  def done(step: Step, manifest: Manifest) -> None:
    if step.stage_name == "evaluate":
      write_metrics(config.run, manifest)

  run_steps(config, list(train_reward_steps(config)), progress_of, lambda: None, done)


def write_metrics(run: Path, manifest: Manifest) -> None:
  """Writes the run's `metrics.json` from what its stages reported."""
  seconds = {name: round(entry["seconds"], 1) for name, entry in manifest.stages.items()}
  counts = {name: value for entry in manifest.stages.values() for name, value in entry["counts"].items()}
  write_json(run / "metrics.json", {**counts, "seconds": seconds})


def _check_inputs(config: RewardConfig) -> None:
  path, template, heldout = config.model.path, config.model.chat_template, config.pairs.heldout
  model = check_reader(config.model, template)
  check_targets(config.training.lora, model, "training")
  if config.probe and model.reward_head:
    raise UserError(f"probe: {path} has a reward head already, which a new one would replace; set it to false")
  pairs = {source: read_preferences(source, margin=config.pairs.margin) for source in config.pairs.train}
  pairs[heldout] = read_preferences(heldout)
  if all(pair.chosen == pair.rejected for pair in pairs[heldout]):
    raise UserError(f"{heldout}: chosen and rejected are equal in every row; give other held-out pairs")
  if isinstance(model, DecoderConfig):
    chat = Chat.load(path, template)
    for source, rows in pairs.items():
      chat.check(((row, pair.prompt) for row, pair in enumerate(rows, 1)), source, "the model")

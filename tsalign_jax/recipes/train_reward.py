"""A reward model from preference pairs: trained, written as a Hugging Face folder, and measured on held-out pairs."""

from collections.abc import Iterator

from tsalign_jax.config import RewardConfig
from tsalign_jax.recipes.step import Step, files_of
from tsalign_jax.stages.measure_reward import measure_reward
from tsalign_jax.stages.train_reward import train_reward


def train_reward_steps(config: RewardConfig) -> Iterator[Step]:
  """Both stages of the training."""
  train = {f"train_{index}": source for index, source in enumerate(config.pairs.train)}
  heldout = files_of({"heldout": config.pairs.heldout})
  template = {"chat_template": config.model.chat_template} if config.model.chat_template else {}
  reads = {"model": config.model.path, **template, **files_of(train), **heldout}
  yield Step("train", train_reward, reads, {"model": "model", "log": "train.jsonl"})
  yield Step("evaluate", measure_reward, {"model": config.run / "model", **heldout}, {"scores": "heldout.parquet"})

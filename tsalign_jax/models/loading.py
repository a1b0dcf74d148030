"""A model as a run refers to it: its folder, its configuration, and how to get its parameters onto a mesh."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tsalign_jax import config as settings
from tsalign_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig, read_config
from tsalign_jax.models.decoder import Layout
from tsalign_jax.models.functional import Skeleton
from tsalign_jax.models.heads import DecoderRewardModel, EncoderRewardModel, LanguageModel
from tsalign_jax.models.hf import load_params
from tsalign_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class ModelHandle:
  """Everything static about a model; two handles that are equal share their compiled programs."""

  folder: Path
  config: ModelConfig
  layout: Layout
  remat: bool
  dtype_name: str
  param_dtype_name: str

  @property
  def dtype(self):
    """Of activations and matrix products."""
    return jnp.dtype(self.dtype_name)

  @property
  def param_dtype(self):
    """Of stored parameters."""
    return jnp.dtype(self.param_dtype_name)

  @property
  def skeleton(self) -> Skeleton:
    """The module without arrays."""
    return _skeleton(self.config, self.layout)

  def load(self, mesh: Mesh, *, fresh_key=None) -> dict[str, jax.Array]:
    """The folder's parameters on the mesh; a missing head is initialised from `fresh_key`."""
    params, _ = load_params(self.folder, self.skeleton, self.config, mesh, dtype=self.param_dtype, fresh_key=fresh_key)
    return params


@functools.lru_cache(maxsize=16)
def _skeleton(config: ModelConfig, layout: Layout) -> Skeleton:
  if isinstance(config, EncoderConfig):
    return Skeleton.of(lambda rngs: EncoderRewardModel(config, rngs))
  kind = DecoderRewardModel if config.reward_head else LanguageModel
  return Skeleton.of(lambda rngs: kind(config, rngs, layout))


def policy_config(model: settings.Model) -> DecoderConfig:
  """The configuration of a causal language model; UserError for an encoder or a reward model."""
  config = read_config(model.path)
  if not isinstance(config, DecoderConfig) or config.reward_head:
    raise UserError(f"{model.path}: a policy is a causal language model, this is a {config.family} of another kind")
  return config


def language_model(model: settings.Model) -> ModelHandle:
  """The handle of a causal language model; UserError for an encoder or a reward model."""
  return _handle(model, policy_config(model))


def reward_model(model: settings.Model) -> ModelHandle:
  """The handle of a reward model; a folder without a reward head gets a fresh one when it is loaded."""
  return _handle(model, dataclasses.replace(read_config(model.path), reward_head=True))


def _handle(model: settings.Model, config: ModelConfig) -> ModelHandle:
  layout = model.layout
  if layout == "auto":
    layout = "unrolled" if jax.default_backend() == "cpu" or isinstance(config, EncoderConfig) else "stacked"
  return ModelHandle(Path(model.path), config, layout, model.remat, model.dtype, model.param_dtype)

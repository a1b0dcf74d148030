"""A model as a run refers to it: its folder, its configuration, and how to get its parameters onto a mesh."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tsalign_jax import config as settings
from tsalign_jax.models.checkpoints import load_tree, saved_names
from tsalign_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig, read_config
from tsalign_jax.models.decoder import Layout
from tsalign_jax.models.functional import Params, Skeleton
from tsalign_jax.models.heads import DecoderRewardModel, EncoderRewardModel, LanguageModel
from tsalign_jax.models.hf import layer_paths, load_params
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
  fresh_head: bool = False  # the folder has no reward head, so a new one is initialised

  @property
  def dtype(self):
    """Of activations and matrix products."""
    return jnp.dtype(self.dtype_name)

  @property
  def param_dtype(self):
    """Of stored parameters."""
    return jnp.dtype(self.param_dtype_name)

  @property
  def for_inference(self) -> "ModelHandle":
    """The same model, its parameters stored as they are multiplied: in half the memory where that is bfloat16."""
    return dataclasses.replace(self, param_dtype_name=self.dtype_name)

  @property
  def skeleton(self) -> Skeleton:
    """The module without arrays."""
    return _skeleton(self.config, self.layout)

  @property
  def head_kernel(self) -> str:
    """The parameter that is the last map of the reward head."""
    return "out.kernel" if isinstance(self.config, EncoderConfig) else "score.kernel"

  def load(self, mesh: Mesh, *, head_key: jax.Array | None = None) -> dict[str, jax.Array]:
    """The folder's parameters on the mesh; `head_key` initialises a reward head that the folder does not have."""
    key = head_key if self.fresh_head else None
    params, _ = load_params(self.folder, self.skeleton, self.config, mesh, dtype=self.param_dtype, fresh_key=key)
    return params

  def restore(self, checkpoint: Path, mesh: Mesh) -> dict[str, jax.Array]:
    """The parameters of a run's checkpoint, whichever layout of layers it was written in."""
    if saved_names(checkpoint) == set(self.skeleton.specs):
      return load_tree(checkpoint, self.skeleton.abstract(mesh, self.param_dtype))
    other = dataclasses.replace(self, layout="stacked" if self.layout == "unrolled" else "unrolled").skeleton
    params = load_tree(checkpoint, other.abstract(mesh, self.param_dtype))
    return change_layout(params, self.skeleton, mesh)

  def stored(self, params: Params) -> dict[str, jax.Array]:
    """Trained parameters in the dtype in which they are kept."""
    return {name: array.astype(self.param_dtype) for name, array in params.items()}


def wide(params: Params) -> dict[str, jax.Array]:
  """Parameters in float32, as they are while they are trained: small steps are lost in bfloat16."""
  return {name: array.astype(jnp.float32) for name, array in params.items()}


def change_layout(params: Params, skeleton: Skeleton, mesh: Mesh) -> dict[str, jax.Array]:
  """Parameters of unrolled layers stacked, or of stacked layers apart: as `skeleton` has them."""
  placed, out = skeleton.shardings(mesh), {}
  for path, spec in skeleton.specs.items():
    stacked = re.sub(r"\.layers\.(\d+)\.", ".layers.", path)
    if spec.stacked:
      array = jnp.stack([params[layer] for layer in layer_paths(path, spec)])
    elif stacked != path:
      array = params[stacked][int(re.search(r"\.layers\.(\d+)\.", path)[1])]
    else:
      array = params[path]
    out[path] = jax.device_put(array, placed[path])
  return out


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


def reward_config(model: settings.Model) -> ModelConfig:
  """The configuration of a folder that is, or may become, a reward model; UserError for a layout it cannot have."""
  config = read_config(model.path)
  if model.layout == "stacked" and isinstance(config, EncoderConfig):
    raise UserError(f"{model.path}: the layers of an encoder are always apart; leave layout = stacked out")
  return config


def reward_model(model: settings.Model) -> ModelHandle:
  """The handle of a reward model; a folder without a reward head gets a fresh one when it is loaded."""
  config = reward_config(model)
  return _handle(model, dataclasses.replace(config, reward_head=True), fresh_head=not config.reward_head)


def _handle(model: settings.Model, config: ModelConfig, *, fresh_head: bool = False) -> ModelHandle:
  layout = model.layout
  if layout == "auto":
    layout = "unrolled" if jax.default_backend() == "cpu" or isinstance(config, EncoderConfig) else "stacked"
  return ModelHandle(Path(model.path), config, layout, model.remat, model.dtype, model.param_dtype, fresh_head)

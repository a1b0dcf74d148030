"""Parameters and training state on disk, through Orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tsalign_jax.models.functional import Params
from tsalign_jax.types import UserError


def save_tree(folder: Path, tree: Any) -> None:
  """Writes a pytree of arrays; the folder appears whole or not at all."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder).absolute(), tree, force=True)


def load_tree(folder: Path, abstract: Any) -> Any:
  """Reads a pytree into these shapes, dtypes and shardings; UserError when the checkpoint cannot be read."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(Path(folder).absolute(), abstract)
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f"{folder}: this checkpoint cannot be read ({str(error).splitlines()[0]})") from error


class StepCheckpoints:
  """Resumable states of one training stage: trainable parameters, optimizer state and data iterator, by step."""

  def __init__(self, folder: Path, every: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=every, create=True)
    self.manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.manager.wait_until_finished()
    self.manager.close()

  def save(self, step: int, trainable: Params, opt_state: Any, iterator: Mapping) -> None:
    """Saves after `step` steps, if it is one of those to save."""
    arguments = ocp.args.Composite(
      state=ocp.args.StandardSave({"trainable": trainable, "opt_state": opt_state}),
      iterator=ocp.args.JsonSave(dict(iterator)),
    )
    self.manager.save(step, args=arguments)

  def latest(self, trainable: Params, opt_state: Any) -> tuple[int, Params, Any, dict] | None:
    """(step, trainable, opt_state, iterator state) of the newest save, or None before the first."""
    step = self.manager.latest_step()
    if step is None:
      return None
    abstract = jax.tree.map(
      lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
      {"trainable": trainable, "opt_state": opt_state},
    )
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), iterator=ocp.args.JsonRestore())
    restored = self.manager.restore(step, args=arguments)
    return step, restored.state["trainable"], restored.state["opt_state"], restored.iterator

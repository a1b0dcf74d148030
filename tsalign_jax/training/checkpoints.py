"""Resumable training states on disk, through Orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tsalign_jax.models.checkpoints import said_to_be
from tsalign_jax.models.functional import Params


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

  def latest(self, abstract: Any, abstract_state: Any) -> tuple[int, Params, Any, dict] | None:
    """(step, trainable, opt_state, iterator state) of the newest save, or None before the first.

    Raises UserError when it does not fit: a failed resume is never a fresh start.
    """
    step = self.manager.latest_step()
    if step is None:
      return None
    wanted = {"trainable": dict(abstract), "opt_state": abstract_state}
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), iterator=ocp.args.JsonRestore())
    what = f"{self.manager.directory}: this half-done training cannot be continued here"
    with said_to_be(what, "; continue on the kind of machine that began it, or delete the folder"):
      restored = self.manager.restore(step, args=arguments)
    return step, restored.state["trainable"], restored.state["opt_state"], restored.iterator

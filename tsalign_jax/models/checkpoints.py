"""Parameters on disk, through Orbax."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

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


def saved_names(folder: Path) -> set[str]:
  """The names of the parameters in a checkpoint; UserError when it cannot be read."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(Path(folder).absolute()).item_metadata
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f"{folder}: this checkpoint cannot be read ({str(error).splitlines()[0]})") from error
  if metadata is None:
    raise UserError(f"{folder}: there is no checkpoint in it")
  return set(metadata.tree)

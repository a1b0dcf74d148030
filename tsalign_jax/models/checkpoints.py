"""Parameters on disk, through Orbax."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tsalign_jax.types import UserError


def save_tree(folder: Path, tree: Any) -> None:
  """Writes a pytree of arrays; the folder appears whole or not at all."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder).absolute(), tree, force=True)


@contextlib.contextmanager
def said_to_be(what: str, then: str = "") -> Iterator[None]:
  """Turns whatever Orbax raises as it reads into a UserError: for damaged arrays, that is a bare Exception."""
  try:
    yield
  except jax.errors.JaxRuntimeError:  # from a device, such as too little memory
    raise
  except Exception as error:
    raise UserError(f"{what} ({str(error).partition(chr(10))[0][:200]}){then}") from error


def load_tree(folder: Path, abstract: Any) -> Any:
  """Reads a pytree into these shapes, dtypes and shardings; UserError when the checkpoint cannot be read."""
  with said_to_be(f"{folder}: this checkpoint cannot be read"), ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(Path(folder).absolute(), abstract)


def saved_names(folder: Path) -> set[str]:
  """The names of the parameters in a checkpoint; UserError when it cannot be read."""
  with said_to_be(f"{folder}: this checkpoint cannot be read"), ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(Path(folder).absolute()).item_metadata
  if metadata is None:
    raise UserError(f"{folder}: there is no checkpoint in it")
  return set(metadata.tree)

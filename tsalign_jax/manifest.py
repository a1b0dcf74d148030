"""The manifest of a run: which stages have committed, and the hash of everything that they read and wrote."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsalign_jax.data.files import fingerprint
from tsalign_jax.types import UserError

# {"reads": {role: hash}, "writes": {path in the run folder: hash}, "seconds": float, "counts": {...}}
Entry = dict[str, Any]
VERSION = 2  # of what stages write and report; to be raised when later stages would read it otherwise


class Manifest:
  """`manifest.json` of a run folder. A stage is in it, or it has not happened."""

  def __init__(self, run: Path):
    """Raises UserError for a folder that another version of this package has written."""
    self.run, self.file = Path(run), Path(run) / "manifest.json"
    try:
      content = json.loads(self.file.read_text()) if self.file.exists() else {"version": VERSION, "stages": {}}
    except ValueError as error:
      raise UserError(f"{self.file}: damaged ({error}); restore it, or start a new run folder") from error
    if content["version"] != VERSION:
      raise UserError(
        f"{self.file}: written by another version of tsalign_jax; finish it with that, or start a new run"
      )
    self.stages: dict[str, Entry] = content["stages"]

  def commit(self, stage: str, entry: Entry) -> None:
    """Adds a stage; on disk before this returns."""
    self.stages[stage] = entry
    write_json(self.file, {"version": VERSION, "stages": self.stages})

  def verify(self, stage: str, reads: Mapping[str, Path]) -> None:
    """Raises UserError when what a committed stage read or wrote is not what it was."""
    entry = self.stages[stage]
    for path, digest in entry["writes"].items():
      where = self.run / path
      if not where.exists():
        raise UserError(f"{where}: missing, although stage {stage} wrote it; restore it, or start a new run folder")
      if fingerprint(where) != digest:
        raise UserError(
          f"{where}: changed or damaged since stage {stage} wrote it; restore it, or start a new run folder"
        )
    for role, path in reads.items():
      if entry["reads"].get(role) != fingerprint(path):
        raise UserError(
          f"{path}: changed since stage {stage} read it; restore it, or start a new run folder for the new input"
        )


def make_durable(path: Path) -> None:
  """Returns when a file, or all that is in a folder, is on disk, names included: a machine may lose its power."""
  for each in [path.parent, path, *(path.rglob("*") if path.is_dir() else ())]:
    descriptor = os.open(each, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def write_json(file: Path, content: Any) -> None:
  """Writes JSON; the file appears whole or not at all, and is on disk before this returns. NaN becomes null."""
  temporary = file.with_name(file.name + ".tmp")
  with temporary.open("w") as out:
    out.write(json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")
    out.flush()
    os.fsync(out.fileno())
  temporary.replace(file)


def _without_nan(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value

"""What recipes are made of: stages with what they read and write."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsalign_jax.stages.base import Stage


@dataclasses.dataclass(frozen=True)
class Step:
  """One stage of a run: its name, function, inputs, and outputs in its folder.

  What comes before the slash of its name is the folder in the run folder: "round_01/sample". Without one, it is the
  run folder itself.
  """

  name: str
  stage: Stage
  reads: Mapping[str, Path]
  writes: Mapping[str, str]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def folder(self) -> str:
    """Where it writes, in the run folder."""
    return self.name.rpartition("/")[0]

  @property
  def stage_name(self) -> str:
    """Its name without the folder."""
    return self.name.rpartition("/")[2]


def files_of(sources: Mapping[str, str | Path | None]) -> dict[str, Path]:
  """Those of the sources that are on disk, and so can be recorded and verified: a `Path` is, text may name a file."""
  on_disk = {name: source for name, source in sources.items() if isinstance(source, Path)}
  return on_disk | {name: Path(source) for name, source in sources.items() if source and Path(source).is_file()}

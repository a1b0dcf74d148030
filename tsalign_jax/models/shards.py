"""Safetensors files of bounded size with the index that Hugging Face reads, one shard in host memory at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

SHARD_BYTES = 4 << 30


class LazyTensor(Protocol):
  """A tensor that is brought to the host only when it is read."""

  @property
  def nbytes(self) -> int:
    """Its size once read."""
    ...

  def read(self) -> np.ndarray:
    """The tensor."""
    ...


def write_shards(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
  """Writes `model.safetensors`, or several shards and their index where there is more than `SHARD_BYTES`."""
  plan = split_state_dict_into_shards_factory(
    dict(tensors),
    get_storage_size=lambda tensor: tensor.nbytes,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=SHARD_BYTES,
  )
  for file, names in plan.filename_to_tensors.items():
    save_file({name: tensors[name].read() for name in names}, folder / file, metadata={"format": "pt"})
  if plan.is_sharded:
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

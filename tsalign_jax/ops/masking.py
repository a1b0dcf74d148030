"""What a layer's attention adds to being causal."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

FAR = 1 << 30  # a window no sequence reaches: "none", where windows differ by layer inside one scan


class Masking(NamedTuple):
  """Logit scale, soft cap (Gemma 2) and sliding window in tokens of one layer.

  `windows` are those that the model has, and `kind` says which of them is this layer's. Layers that are scanned share
  one program, so theirs is traced: a path that needs windows to be static compiles one branch for each of them.
  """

  scale: float
  softcap: float | None = None
  windows: tuple[int | None, ...] = (None,)
  kind: int | Array = 0

  @property
  def window(self) -> int | Array | None:
    """This layer's window; None where it has none."""
    if isinstance(self.kind, int):
      return self.windows[self.kind]
    return jnp.asarray([window or FAR for window in self.windows])[self.kind]

"""A module as a pure function of its parameters, which are a flat dict: name -> array.

The flat dict is what optimizers, checkpoints, shardings and weight files all speak:

    skeleton = Skeleton.of(lambda rngs: LanguageModel(config, rngs))
    skeleton.specs["model.layers.0.mlp.up_proj.kernel"]   # shape, logical axes
    skeleton.bind(params).model(tokens, ...)              # inside a jitted program
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tsalign_jax.parallel.mesh import sharding

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """What a parameter's declaration says: shape, logical axes, and for a matrix how many axes are its input."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  inputs: int | None = None

  @property
  def stacked(self) -> bool:
    """True where the first axis counts layers."""
    return self.axes[:1] == ("layers",)


@dataclasses.dataclass(frozen=True, eq=False)
class Skeleton:
  """A module without its arrays."""

  graph: nnx.GraphDef
  state: nnx.State  # abstract
  specs: Mapping[str, ParamSpec]
  make: Callable[[nnx.Rngs], nnx.Module]

  @classmethod
  def of(cls, make: Callable[[nnx.Rngs], nnx.Module]) -> "Skeleton":
    """The skeleton of what `make` builds; nothing is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    specs = {name: _spec(param) for name, param in _named(state)}
    return cls(graph, state, specs, make)

  def bind(self, params: Params) -> nnx.Module:
    """The module with these parameters; traceable."""
    leaves = [(path, param.replace(params[_join(path)])) for path, param in nnx.to_flat_state(self.state)]
    return nnx.merge(self.graph, nnx.from_flat_state(leaves))

  def init(self, key: jax.Array, names: set[str] | None = None) -> dict[str, jax.Array]:
    """Freshly initialised parameters: all, or the named ones."""

    @jax.jit
    def build(key):
      _, state = nnx.split(self.make(nnx.Rngs(key)), nnx.Param)
      return {name: param[...] for name, param in _named(state) if names is None or name in names}

    return build(key)

  def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lives on this mesh."""
    return {name: sharding(spec.axes, spec.shape, mesh) for name, spec in self.specs.items()}

  def abstract(self, mesh: Mesh, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtype and shardings: what checkpoints are restored into and programs are compiled for."""
    placed = self.shardings(mesh)
    return {name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placed[name]) for name, spec in self.specs.items()}


def _named(state: nnx.State):
  return [(_join(path), param) for path, param in nnx.to_flat_state(state)]


def _join(path) -> str:
  return ".".join(map(str, path))


def _spec(param) -> ParamSpec:
  shape = tuple(param.shape)
  axes = tuple(param.axes)
  if len(shape) == len(axes) + 1:
    axes = ("layers", *axes)
  return ParamSpec(shape, axes, getattr(param, "inputs", None))

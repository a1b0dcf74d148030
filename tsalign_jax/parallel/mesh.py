"""The device mesh, and the one table that says along which mesh axes each logical axis is split."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsalign_jax.types import UserError

Launched = TypeVar("Launched")
AXES = ("data", "fsdp", "tensor")

# Logical axes that stand in no row here (head_dim, layers, rank, ...) are replicated.
RULES: Mapping[str, str | tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
}


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence | None = None) -> Mesh:
  """A mesh over all devices with axes (data, fsdp, tensor); one size may be -1, which takes what is left.

  Raises UserError where the sizes do not make the number of devices, or several processes take part.
  """
  if jax.process_count() > 1:
    raise UserError(f"this job has {jax.process_count()} processes; a run uses the devices of one process")
  devices = jax.devices() if devices is None else list(devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(f"mesh: only one axis may be -1, but {' and '.join(free)} are")
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if free:
    sizes[free[0]] = len(devices) // fixed
  if int(np.prod(list(sizes.values()))) != len(devices):
    wanted = " x ".join(f"{name} {size}" for name, size in sizes.items())
    raise UserError(f"mesh: {wanted} does not make {len(devices)}, the number of devices")
  shape = [sizes[axis] for axis in AXES]
  # On TPUs neighbours in the mesh are neighbours in the slice, as far as its shape allows.
  return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Where an array with these logical axes lives; an axis that its mesh axes do not divide is replicated."""
  spec = []
  for axis, size in zip(axes, shape, strict=True):
    target = RULES.get(axis) if axis else None
    names = (target,) if isinstance(target, str) else target or ()
    ways = int(np.prod([mesh.shape[name] for name in names]))
    spec.append(target if names and ways > 1 and size % ways == 0 else None)
  while spec and spec[-1] is None:
    spec.pop()  # as programs return it: an equal spec spelled otherwise would compile them twice
  return PartitionSpec(*spec)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """The NamedSharding of an array with these logical axes."""
  return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole: scalars, random keys, step counters."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(batch, mesh: Mesh):
  """A pytree of host arrays on the devices, its first axis split over the batch axes of the mesh."""

  def put(array):
    array = np.asarray(array)
    axes = ("batch", *[None] * (array.ndim - 1)) if array.ndim else ()
    return jax.device_put(array, sharding(axes, array.shape, mesh))

  return jax.tree.map(put, batch)


def pipelined(launched: Iterable[Launched], depth: int = 2) -> Iterator[Launched]:
  """The same items, each once `depth` are launched: so a device or server works while the host goes on."""
  under_way: deque[Launched] = deque()
  for item in launched:
    under_way.append(item)
    if len(under_way) == depth:
      yield under_way.popleft()
  yield from under_way


def constrain(array: jax.Array, axes: Sequence[str | None], mesh: Mesh) -> jax.Array:
  """The same array, constrained to live where its logical axes say: for activations inside a program."""
  return jax.lax.with_sharding_constraint(array, sharding(axes, array.shape, mesh))


def constrain_batch(array: jax.Array, mesh: Mesh) -> jax.Array:
  """The same array, its first axis constrained to the batch axes of the mesh."""
  return constrain(array, ("batch", *[None] * (array.ndim - 1)), mesh)


def platform(mesh: Mesh) -> str:
  """What programs on this mesh run on: "cpu", "gpu" or "tpu", also where that is not the machine that traces them."""
  return mesh.devices.flat[0].platform


def is_nvidia(mesh: Mesh) -> bool:
  """Whether programs on this mesh run on NVIDIA GPUs; JAX calls others "gpu" as well."""
  return platform(mesh) == "gpu" and mesh.devices.flat[0].device_kind.startswith("NVIDIA")


def batch_ways(mesh: Mesh) -> int:
  """Over how many devices the first axis of a batch is split: batch sizes are multiples of it."""
  return mesh.shape["data"] * mesh.shape["fsdp"]

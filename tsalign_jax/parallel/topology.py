"""TPU slices that need not exist: programs are compiled for them on any machine that has libtpu."""

import importlib.util

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.types import UserError

# To be set before jax is imported: libtpu then looks neither for a TPU nor for its metadata server.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_mesh(name: str, *, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
  """The mesh of a TPU slice by its name, such as "v5e:4x4" or "v5p:2x2x4"; its devices compile but do not run.

  Raises UserError where libtpu is not installed, there is no such slice, or the sizes do not make its devices.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("compiling for a TPU needs its compiler; install it with: pip install 'tsalign_jax[tpu]'")
  whole_chips = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # else two devices a chip
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **whole_chips)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"{name}: not a TPU slice such as v5e:4x4 or v5p:2x2x4 ({str(error).splitlines()[0]})") from error
  return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=topology.devices)

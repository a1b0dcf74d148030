"""Tests run on CPU, in float32, with eight fake devices to build meshes from."""

import json
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import commands
import hypothesis
import jax
import pytest

from tsalign_jax.parallel.mesh import make_mesh

# What an example takes depends on what has been compiled already, and on what else the machine does.
hypothesis.settings.register_profile(
  "compiling", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("compiling")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
  """A folder that all workers of this run of the tests share."""
  own = tmp_path_factory.getbasetemp()
  return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def compiled(shared):
  """Where programs are kept: what one test compiles, others find, and so do the commands that they start."""
  settings = {
    "jax_compilation_cache_dir": str(shared / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for name, value in settings.items():
    jax.config.update(name, value)
  return {name.upper(): str(value) for name, value in settings.items()}


@pytest.fixture(scope="session")
def environment(compiled):
  """For commands on one device."""
  return os.environ | compiled | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.fixture(scope="session")
def tsalign(environment):
  """Runs a command without any device, as touching one fails; gives exit code, output and errors.

  The process that does so is the same for all of them.
  """
  command = [sys.executable, commands.__file__]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, env=environment | {"JAX_PLATFORMS": "nothing", "COLUMNS": "200"}, **pipes) as process:

    def run(*arguments) -> subprocess.CompletedProcess:
      process.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
      process.stdin.flush()
      return subprocess.CompletedProcess(arguments, *json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()


@pytest.fixture(scope="session")
def one_device():
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
  return make_mesh(fsdp=4, tensor=2)

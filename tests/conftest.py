"""Tests run on CPU, in float32, with eight fake devices to build meshes from."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from tsalign_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  """For commands on one device; what one of them compiles, the next ones find."""
  return os.environ | {
    "XLA_FLAGS": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


@pytest.fixture(scope="session")
def one_device():
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
  return make_mesh(fsdp=4, tensor=2)

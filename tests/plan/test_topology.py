"""Slices by their names."""

import importlib.util

import pytest

from tsalign_jax.parallel.topology import topology_mesh
from tsalign_jax.types import UserError


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install"):
    topology_mesh("v5e:4x4")

"""Which linear maps get adapters, and which parameters are trained."""

import jax
import numpy as np
import pytest
import tiny

from tsalign_jax.config import LoRA, Policy, Student
from tsalign_jax.models.config import read_config
from tsalign_jax.models.loading import language_model, reward_model
from tsalign_jax.models.lora import adapted_skeleton, check_targets, is_adapter, trained_part
from tsalign_jax.types import UserError

FAMILIES = {**dict.fromkeys(tiny.DECODERS, tiny.decoder), **dict.fromkeys(tiny.ENCODERS, tiny.encoder)}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_targets_every_matrix_of_every_layer_gets_an_adapter_and_no_other(family, tmp_path):
  FAMILIES[family](family, tmp_path)
  model = reward_model(Student(path=tmp_path))
  matrices = {name for name, spec in model.skeleton.specs.items() if spec.inputs and ".layers." in name}
  adapters = {name for name in adapted_skeleton(model, LoRA()).specs if is_adapter(name)}
  assert {name.rsplit(".", 1)[0] for name in adapters} == {name.rsplit(".", 1)[0] for name in matrices}
  maps = tuple(sorted({name.split(".")[-2] for name in matrices}))
  check_targets(LoRA(targets=maps), read_config(tmp_path), "align")
  other = "query" if "query" not in maps else "q_proj"
  with pytest.raises(UserError, match=rf"align.lora.targets: a \w+ has no {other}; it has .*{maps[0]}"):
    check_targets(LoRA(targets=(*maps, other)), read_config(tmp_path), "align")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_adapters_and_the_head_are_trained_and_the_rest_is_frozen(family, tmp_path, one_device):
  FAMILIES[family](family, tmp_path)
  model = reward_model(Student(path=tmp_path, param_dtype="bfloat16"))
  params = model.load(one_device, head_key=jax.random.key(0))
  part = trained_part(model, LoRA(rank=2), lambda: params, jax.random.key(1), one_device)
  trained = part.load()
  assert set(trained) == set(part.names) == set(part.abstract(one_device))
  assert set(trained).isdisjoint(part.frozen) and {*trained, *part.frozen} == set(part.skeleton.specs)
  head = {name for name in model.skeleton.specs if not name.startswith("model.")}
  assert head and {name for name in trained if not is_adapter(name)} == head
  assert all(array.dtype == np.float32 for array in trained.values())
  changed = {name: array + 1.0 for name, array in trained.items()}
  whole = part.whole(changed)
  assert set(whole) == set(model.skeleton.specs)
  for name in head:
    np.testing.assert_array_equal(whole[name], changed[name])


def test_of_a_policy_only_adapters_are_trained(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path))
  assert "lm_head.kernel" in model.skeleton.specs
  part = trained_part(model, LoRA(), lambda: model.load(one_device), jax.random.key(0), one_device)
  assert all(map(is_adapter, part.names)) and "lm_head.kernel" in part.frozen

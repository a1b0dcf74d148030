"""Handles of models: what they load, restore and refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from tsalign_jax.config import Policy, Student
from tsalign_jax.models.checkpoints import load_tree, save_tree
from tsalign_jax.models.loading import language_model, reward_model
from tsalign_jax.types import UserError


def change_file(folder, change) -> None:
  file = folder / "model.safetensors"
  tensors = load_file(file)
  change(tensors)
  save_file(tensors, file)


@pytest.mark.parametrize(("written", "read"), [("stacked", "unrolled"), ("unrolled", "stacked")])
def test_checkpoint_of_one_layout_is_restored_into_the_other(written, read, tmp_path, one_device):
  tiny.decoder("qwen3", tmp_path / "model")
  ours = language_model(Policy(path=tmp_path / "model", layout=read))
  other = language_model(Policy(path=tmp_path / "model", layout=written))
  save_tree(tmp_path / "checkpoint", other.load(one_device))
  restored, expected = ours.restore(tmp_path / "checkpoint", one_device), ours.load(one_device)
  assert restored.keys() == expected.keys()
  assert all(np.array_equal(restored[name], expected[name]) for name in expected)


def test_missing_checkpoint_is_refused(tmp_path, one_device):
  tiny.decoder("llama", tmp_path / "model")
  with pytest.raises(UserError, match="there is no checkpoint in it"):
    language_model(Policy(path=tmp_path / "model")).restore(tmp_path / "nothing", one_device)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what else Orbax was reading
def test_damaged_checkpoint_is_refused(tmp_path, one_device):
  """Whichever file is cut short: it is read as it was, or refused."""
  tree = {"a": jnp.arange(1000.0), "b": jnp.ones((20, 30))}
  abstract = {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for name, each in tree.items()}
  save_tree(tmp_path / "whole", tree)
  files, refused = [file for file in (tmp_path / "whole").rglob("*") if file.is_file()], []
  largest = max(files, key=lambda file: file.stat().st_size)  # holds the arrays
  for file in files:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    try:
      read = load_tree(tmp_path / "whole", abstract)
      assert all(np.array_equal(read[name], tree[name]) for name in tree)
    except UserError as error:
      assert "whole: this checkpoint cannot be read (" in str(error)
      refused.append(file)
    file.write_bytes(content)
  assert largest in refused


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight"])
def test_missing_tensor_is_refused_by_name(name, tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  change_file(tmp_path, lambda tensors: tensors.pop(name))
  with pytest.raises(UserError, match=name):
    language_model(Policy(path=tmp_path)).load(one_device)


def test_reward_model_without_its_head_is_refused_and_a_backbone_gets_a_new_one(tmp_path, one_device):
  tiny.decoder("llama", tmp_path / "reward", reward=True)
  change_file(tmp_path / "reward", lambda tensors: tensors.pop("score.weight"))
  with pytest.raises(UserError, match=r"score\.weight"):
    reward_model(Student(path=tmp_path / "reward")).load(one_device, head_key=jax.random.key(0))
  tiny.decoder("llama", tmp_path / "backbone")
  fresh = reward_model(Student(path=tmp_path / "backbone")).load(one_device, head_key=jax.random.key(0))
  assert fresh["score.kernel"].shape == (32, 1) and jnp.abs(fresh["score.kernel"]).max() > 0


def test_misshapen_tensor_is_refused(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)

  def transpose(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ascontiguousarray(tensors["model.layers.0.mlp.up_proj.weight"].T)

  change_file(tmp_path, transpose)
  with pytest.raises(UserError, match=r"up_proj.weight has shape \(32, 48\), its config.json asks for \(48, 32\)"):
    language_model(Policy(path=tmp_path)).load(one_device)


def test_quantised_weights_are_refused(tmp_path):
  tiny.decoder("llama", tmp_path)
  tiny.change_json(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
  with pytest.raises(UserError, match="its weights are quantised"):
    language_model(Policy(path=tmp_path))


def test_stacked_layers_of_an_encoder_are_refused(tmp_path):
  tiny.encoder("bert", tmp_path)
  with pytest.raises(UserError, match=r"the layers of an encoder are always apart; leave layout = stacked out"):
    reward_model(Student(path=tmp_path, layout="stacked"))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_layers_are_apart_on_cpus_and_in_encoders_and_else_stacked(platform, tmp_path, monkeypatch):
  tiny.decoder("llama", tmp_path / "decoder")
  tiny.encoder("bert", tmp_path / "encoder")
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert language_model(Policy(path=tmp_path / "decoder")).layout == ("unrolled" if platform == "cpu" else "stacked")
  assert reward_model(Student(path=tmp_path / "encoder")).layout == "unrolled"

"""Every decoder family against transformers on PyTorch, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from ragged import one_sequence, ragged_batch

from tsalign_jax.models.config import read_config
from tsalign_jax.models.functional import Skeleton
from tsalign_jax.models.heads import DecoderRewardModel, LanguageModel
from tsalign_jax.models.hf import load_params, save_params
from tsalign_jax.ops.attention import TrunkAndBranches, flatten

TOLERANCE = 1e-4


def whole(batch, row: int, k: int) -> list[int]:
  prompt, response = one_sequence(batch, row, k)
  return prompt + response


def load_language_model(folder, mesh, layout="unrolled"):
  config = read_config(folder)
  skeleton = Skeleton.of(lambda rngs: LanguageModel(config, rngs, layout))
  params, missing = load_params(folder, skeleton, config, mesh)
  assert not missing
  return config, skeleton, params


def branch_logits(skeleton, params, batch):
  model = skeleton.bind(params)
  hidden, _ = model.model(*flatten(batch), TrunkAndBranches(batch))
  return np.asarray(model.logits(hidden, model.head()))


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_logits_equal_transformers(family, layout, tmp_path, one_device):
  peer = tiny.decoder(family, tmp_path)
  _, skeleton, params = load_language_model(tmp_path, one_device, layout)
  batch = ragged_batch(1, k=2)
  ours = branch_logits(skeleton, params, batch)
  for row in range(3):
    for k in range(2):
      tokens = whole(batch, row, k)
      theirs = peer(torch.tensor([tokens])).logits[0].detach().numpy()
      trunk, branch = batch.trunk_length[row], batch.branch_length[row, k]
      start = 9 + 8 * k
      mine = np.concatenate([ours[row, 9 - trunk : 9], ours[row, start : start + branch]])
      np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", tiny.REWARD)
def test_reward_equals_transformers(family, tmp_path, one_device):
  peer = tiny.decoder(family, tmp_path, reward=True)
  config = read_config(tmp_path)
  skeleton = Skeleton.of(lambda rngs: DecoderRewardModel(config, rngs))
  params, _ = load_params(tmp_path, skeleton, config, one_device)
  batch = ragged_batch(2, k=2)
  ours = np.asarray(skeleton.bind(params)(batch))
  for row in range(3):
    for k in range(2):
      theirs = peer(torch.tensor([whole(batch, row, k)])).logits[0, 0].item()
      assert ours[row, k] == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_exported_folder_loads_in_transformers(family, layout, tmp_path, one_device, monkeypatch):
  import transformers

  peer = tiny.decoder(family, tmp_path / "source")
  config, skeleton, params = load_language_model(tmp_path / "source", one_device, layout)
  monkeypatch.setattr("tsalign_jax.models.shards.SHARD_BYTES", 20_000)  # several shards, with an index
  save_params(params, skeleton, config, tmp_path / "source", tmp_path / "export", dtype=jnp.float32)
  assert (tmp_path / "export" / "model.safetensors.index.json").is_file()
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
  tokens = torch.arange(3, 20)[None]
  assert torch.equal(again(tokens).logits, peer(tokens).logits)
  _, _, reread = load_language_model(tmp_path / "export", one_device, layout)
  assert all(np.array_equal(reread[name], params[name]) for name in params)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_sharded_logits_equal_single_device(family, tmp_path, one_device, eight_devices):
  tiny.decoder(family, tmp_path)
  _, skeleton, params = load_language_model(tmp_path, one_device)
  _, _, split = load_language_model(tmp_path, eight_devices)
  assert any(len(array.sharding.device_set) == 8 and not array.sharding.is_fully_replicated for array in split.values())
  batch = ragged_batch(3, rows=4, k=2)
  np.testing.assert_allclose(
    branch_logits(skeleton, split, batch), branch_logits(skeleton, params, batch), atol=TOLERANCE
  )

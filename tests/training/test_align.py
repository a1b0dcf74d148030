"""Branch log-probabilities and the DPO step, against PyTorch on every sequence by itself."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import torch
from ragged import one_sequence, ragged_batch

from tsalign_jax.config import Align, LoRA, Policy
from tsalign_jax.models.hf import hf_tensors
from tsalign_jax.models.loading import language_model
from tsalign_jax.models.lora import adapted_skeleton, is_adapter, merge
from tsalign_jax.training.align import AlignBatch, branch_logps, build_loss, build_reference
from tsalign_jax.types import Branches

TOLERANCE = 1e-4


def torch_logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
  """log p(response | prompt), the sequence on its own."""
  logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
  return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()


def load(folder, mesh, layout="unrolled", **changes):
  model = language_model(Policy(path=folder, dtype="float32", layout=layout, **changes))
  return model, model.load(mesh)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_branch_equals_running_alone(family, layout, tmp_path, one_device):
  peer = tiny.decoder(family, tmp_path)
  model, params = load(tmp_path, one_device, layout)
  batch = ragged_batch(1)
  together = np.asarray(build_reference(model, one_device)(params, batch))
  for row in range(3):
    for k in range(3):
      alone = torch_logp(peer, *one_sequence(batch, row, k)).item()
      assert together[row, k] == pytest.approx(alone, abs=TOLERANCE)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_logps_do_not_change_with_what_else_is_in_the_batch(family, tmp_path, one_device):
  tiny.decoder(family, tmp_path)
  model, params = load(tmp_path, one_device)
  program = build_reference(model, one_device)
  batch = ragged_batch(2)
  expected = np.asarray(program(params, batch))
  # Same first prompt and first branch, everything else different, including all padding.
  other = ragged_batch(3)
  trunk_start = 9 - batch.trunk_length[0]
  mixed = dataclasses.replace(
    other,
    trunk=np.concatenate(
      [np.append(other.trunk[0, :trunk_start], batch.trunk[0, trunk_start:])[None], other.trunk[1:]]
    ),
    trunk_length=np.concatenate([batch.trunk_length[:1], other.trunk_length[1:]]),
    branches=_with_first(other.branches, batch.branches, batch.branch_length[0, 0]),
    branch_length=_with_first_length(other.branch_length, batch.branch_length[0, 0]),
  )
  assert np.asarray(program(params, mixed))[0, 0] == pytest.approx(expected[0, 0], abs=TOLERANCE)


def _with_first(into, source, length):
  out = into.copy()
  out[0, 0, :length] = source[0, 0, :length]
  return out


def _with_first_length(lengths, length):
  out = lengths.copy()
  out[0, 0] = length
  return out


def torch_dpo(policy, reference, batch: Branches, *, beta: float, smoothing: float, sft: float) -> torch.Tensor:
  """DPO written out pair by pair, as in the paper's equation 7."""
  total = torch.tensor(0.0)
  rows = batch.trunk.shape[0]
  for row in range(rows):
    (prompt, chosen), (_, rejected) = one_sequence(batch, row, 0), one_sequence(batch, row, 1)
    pi_chosen, pi_rejected = torch_logp(policy, prompt, chosen), torch_logp(policy, prompt, rejected)
    with torch.no_grad():
      ref_chosen, ref_rejected = torch_logp(reference, prompt, chosen), torch_logp(reference, prompt, rejected)
    margin = beta * ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected))
    right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
    total = total - (1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)
    total = total - sft * pi_chosen / len(chosen)
  return total / rows


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_dpo_loss_and_gradients_equal_pytorch(family, layout, tmp_path, one_device):
  peer, reference = tiny.decoder(family, tmp_path / "policy"), tiny.decoder(family, tmp_path / "reference", seed=1)
  model, params = load(tmp_path / "policy", one_device, layout, remat=True)
  other, reference_params = load(tmp_path / "reference", one_device, layout)
  batch = ragged_batch(4, k=2)
  align = Align(beta=0.3, label_smoothing=0.1, sft_weight=0.2)
  reference_logps = build_reference(other, one_device)(reference_params, batch)
  weights = np.full(3, 1 / 3, np.float32)
  step = jax.value_and_grad(build_loss(model, one_device, align), has_aux=True)
  (value, _), gradients = step(params, {}, AlignBatch(batch, reference_logps, weights))

  expected = torch_dpo(peer, reference, batch, beta=0.3, smoothing=0.1, sft=0.2)
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  theirs = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
  ours = {name: tensor.read() for name, tensor in hf_tensors(gradients, model.skeleton, model.config, np.float32)}
  assert ours.keys() == theirs.keys()
  scale = max(np.linalg.norm(gradient) for gradient in theirs.values())
  for name, gradient in theirs.items():
    difference = np.linalg.norm(ours[name] - gradient)
    assert difference <= 1e-5 * np.linalg.norm(gradient) + 1e-7 * scale, name


def test_lora_starts_as_the_model_and_merges_into_it(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  for layout in ("unrolled", "stacked"):
    model, params = load(tmp_path, one_device, layout)
    lora = LoRA(rank=2, alpha=6.0)
    skeleton = adapted_skeleton(model, lora)
    adapters = skeleton.init(jax.random.key(0), {name for name in skeleton.specs if is_adapter(name)})
    assert len(adapters) == 2 * 7 * (1 if layout == "stacked" else 4)
    batch = ragged_batch(5)

    def logps(parameters, skeleton=skeleton, model=model, batch=batch):
      return np.asarray(branch_logps(skeleton.bind(parameters), batch, model, one_device))

    plain = build_reference(model, one_device)(params, batch)
    np.testing.assert_allclose(logps({**params, **adapters}), plain, atol=1e-5)
    trained = {name: array + 0.05 for name, array in adapters.items()}
    adapted = logps({**params, **trained})
    assert np.abs(adapted - plain).max() > 1.0
    merged = build_reference(model, one_device)(merge({**params, **trained}, lora), batch)
    np.testing.assert_allclose(merged, adapted, atol=1e-3)

"""Branch log-probabilities and the DPO step, against PyTorch on every sequence by itself."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import torch
from ragged import packed_rows, ragged_items

from tsalign_jax.config import Align, LoRA, Policy
from tsalign_jax.data.packing import Item
from tsalign_jax.models.hf import hf_tensors
from tsalign_jax.models.loading import language_model
from tsalign_jax.models.lora import adapted_skeleton, is_adapter, merge
from tsalign_jax.training.align import AlignBatch, branch_logps, build_loss, build_reference
from tsalign_jax.training.optimizer import build_trainer

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
  items = ragged_items(1)
  together = logps_of(build_reference(model, one_device), params, items)
  for item, logps in zip(items, together, strict=True):
    for response, logp in zip(item.responses, logps, strict=True):
      assert logp == pytest.approx(torch_logp(peer, item.prompt, response).item(), abs=TOLERANCE)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_logps_do_not_change_with_what_else_is_in_the_batch(family, tmp_path, one_device):
  tiny.decoder(family, tmp_path)
  model, params = load(tmp_path, one_device)
  program = build_reference(model, one_device)
  items, others = ragged_items(2), ragged_items(3)
  expected = logps_of(program, params, items)[0]
  assert logps_of(program, params, [*others, items[0]])[-1] == pytest.approx(expected, abs=TOLERANCE)
  sibling = Item(items[0].prompt, [items[0].responses[0], *others[0].responses[1:]])
  assert logps_of(program, params, [sibling, *others])[0][0] == pytest.approx(expected[0], abs=TOLERANCE)


def logps_of(program, params, items: list[Item]) -> np.ndarray:
  """[items, k] of a program over one packed batch."""
  batch, place = packed_rows(items)
  out = np.full((len(items), len(items[0].responses)), np.nan)
  out[place[place >= 0]] = np.asarray(program(params, batch))[place >= 0]
  return out


def torch_dpo(
  policy, reference, pairs: list[Item], *, beta: float, smoothing: float, sft: float
) -> tuple[torch.Tensor, dict[str, float]]:
  """DPO written out pair by pair, as in the paper's equation 7, and means of what TRL reports of each."""
  total, report = torch.tensor(0.0), []
  for prompt, (chosen, rejected) in pairs:
    pi_chosen, pi_rejected = torch_logp(policy, prompt, chosen), torch_logp(policy, prompt, rejected)
    with torch.no_grad():
      ref_chosen, ref_rejected = torch_logp(reference, prompt, chosen), torch_logp(reference, prompt, rejected)
    margin = beta * ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected))
    right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
    total = total - (1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)
    total = total - sft * pi_chosen / len(chosen)
    report.append(
      {
        "rewards/chosen": beta * (pi_chosen - ref_chosen),
        "rewards/rejected": beta * (pi_rejected - ref_rejected),
        "rewards/margins": margin,
        "rewards/accuracies": margin > 0,
        "logps/chosen": pi_chosen,
        "logps/rejected": pi_rejected,
        "logps/drift": ((pi_chosen - ref_chosen).abs() + (pi_rejected - ref_rejected).abs()) / 2,
      }
    )
  means = {name: np.mean([each[name].item() for each in report]) for name in report[0]}
  return total / len(pairs), means | {"loss": (total / len(pairs)).item()}


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_dpo_loss_and_gradients_equal_pytorch(family, layout, tmp_path, one_device):
  peer, reference = tiny.decoder(family, tmp_path / "policy"), tiny.decoder(family, tmp_path / "reference", seed=1)
  model, params = load(tmp_path / "policy", one_device, layout, remat=True)
  other, reference_params = load(tmp_path / "reference", one_device, layout)
  pairs = ragged_items(4, k=2)
  batch, place = packed_rows(pairs)
  align = Align(beta=0.3, label_smoothing=0.1, sft_weight=0.2)
  reference_logps = build_reference(other, one_device)(reference_params, batch)
  weights = np.where(place >= 0, np.float32(1 / len(pairs)), 0)
  step = jax.value_and_grad(build_loss(model, one_device, align), has_aux=True)
  (value, metrics), gradients = step(params, {}, AlignBatch(batch, reference_logps, weights))

  expected, report = torch_dpo(peer, reference, pairs, beta=0.3, smoothing=0.1, sft=0.2)
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  assert 0 < report["rewards/accuracies"] < 1
  assert {name: float(each) for name, each in metrics.items()} == pytest.approx(report, rel=1e-4)
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
    batch, _ = packed_rows(ragged_items(5))

    def logps(parameters, skeleton=skeleton, model=model, batch=batch):
      return np.asarray(branch_logps(skeleton.bind(parameters), batch, model, one_device))

    plain = build_reference(model, one_device)(params, batch)
    np.testing.assert_allclose(logps({**params, **adapters}), plain, atol=1e-5)
    trained = {name: array + 0.05 for name, array in adapters.items()}
    adapted = logps({**params, **trained})
    assert np.abs(adapted - plain).max() > 1.0
    merged = build_reference(model, one_device)(merge({**params, **trained}, lora), batch)
    np.testing.assert_allclose(merged, adapted, atol=1e-3)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_a_training_step_holds_no_array_of_tokens_by_vocabulary(layout, tmp_path, one_device):
  """Of a vocabulary so large that its logits, in float32 and of all response tokens, would be most of the memory."""
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16", layout=layout))
  vocab = 1 << 16
  model = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab=vocab))
  pairs, place = packed_rows([Item([1] * 200, ([2] * 150, [3] * 150)) for _ in range(12)])
  batch = AlignBatch(pairs, np.zeros((*place.shape, 2), np.float32), np.zeros(place.shape, np.float32))
  trainer = build_trainer(build_loss(model, one_device, Align()), Align(), 1, model.skeleton, one_device)
  params = model.skeleton.abstract(one_device)
  program = trainer.accumulate.lower(params, True, params, {}, batch).compile()
  tokens = pairs.target.size
  assert tokens >= 3600 and f"[{tokens},{vocab}]" not in program.as_text()
  assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2

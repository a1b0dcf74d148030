"""The accumulate-then-update pair of programs."""

import jax
import numpy as np
import pytest
import tiny
from ragged import ragged_items

from tsalign_jax.config import Align, Policy
from tsalign_jax.data.packing import Packing
from tsalign_jax.models.loading import language_model
from tsalign_jax.training.align import AlignBatch, build_loss
from tsalign_jax.training.optimizer import build_trainer, fetch


def test_step_in_parts_equals_the_step_at_once(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32"))
  items, results = ragged_items(6, count=13, k=2, prompt=90, response=60), []
  for tokens in (256, 768, 1 << 20):
    packing = Packing(items, len(items), tokens, 1)
    parts = [
      AlignBatch(packed, np.zeros((*place.shape, 2), np.float32), np.where(place >= 0, np.float32(1 / 13), 0))
      for packed, place in packing.batches(range(len(items)))
    ]
    trainer = build_trainer(build_loss(model, one_device, Align()), Align(clip=1e9), 1, model.skeleton, one_device)
    params = model.load(one_device)
    gradients = trainer.zeros(params)
    for part in parts:
      gradients, _ = trainer.accumulate(gradients, params, {}, part)
    gradients = jax.device_get(gradients)
    _, _, metrics = trainer.step(params, {}, trainer.init(params), parts)
    results.append((len(parts), gradients, fetch(metrics)))
  assert len({count for count, *_ in results}) == 3 and results[-1][0] == 1
  _, whole, expected = results[-1]
  for _, gradients, metrics in results[:-1]:
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    scale = max(np.abs(gradient).max() for gradient in whole.values())
    for name, gradient in whole.items():
      np.testing.assert_allclose(gradients[name], gradient, atol=1e-5 * scale, err_msg=name)

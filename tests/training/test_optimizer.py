"""The accumulate-then-update pair of programs, and the optimizer in it, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from ragged import ragged_items

from tsalign_jax.config import Align, Optimizer, Policy
from tsalign_jax.data.packing import Packing
from tsalign_jax.models.loading import language_model
from tsalign_jax.training.align import build_loss, build_reference, known_logps, make_batches
from tsalign_jax.training.optimizer import build_trainer, fetch, make_optimizer, make_schedule


def test_step_in_parts_equals_the_step_at_once(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32"))
  items, results, known = ragged_items(6, count=13, k=2, prompt=90, response=60), [], []
  step, program = list(np.random.default_rng(1).permutation(13)), build_reference(model, one_device)
  reference = np.random.default_rng(0).normal(-50, 5, (len(items), 2)).astype(np.float32)
  for tokens in (256, 768, 1 << 20):
    packing = Packing(items, len(step), tokens, 1)
    known.append(known_logps(program, model.load(one_device), packing, [step[:9], step[9:]], one_device))
    parts = list(make_batches(packing, step, reference, one_device))
    trainer = build_trainer(build_loss(model, one_device, Align()), Align(clip=1e9), 1, model.skeleton, one_device)
    params = model.load(one_device)
    state = trainer.start(params)
    gradients, _ = trainer.gradients(state, {}, parts)
    left = jax.tree.map(lambda old: old * np.nan, gradients)  # what a step finds there is not looked at
    gradients = jax.device_get(gradients)
    _, metrics = trainer.step(state._replace(gradients=left), {}, parts)
    results.append((len(parts), gradients, fetch(metrics)))
  assert len({count for count, *_ in results}) == 3 and results[-1][0] == 1
  assert np.isfinite(known).all()
  for logps in known[:-1]:
    np.testing.assert_allclose(logps, known[-1], atol=1e-4)
  _, whole, expected = results[-1]
  for _, gradients, metrics in results[:-1]:
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    scale = max(np.abs(gradient).max() for gradient in whole.values())
    for name, gradient in whole.items():
      np.testing.assert_allclose(gradients[name], gradient, atol=1e-5 * scale, err_msg=name)


LAST = {"constant": 1.0, "linear": 1 / 8, "cosine": (1 + np.cos(np.pi * 7 / 8)) / 2}


@pytest.mark.parametrize("schedule", LAST)
def test_the_learning_rate_rises_over_its_share_of_the_steps_and_then_falls(schedule):
  rate = make_schedule(Optimizer(learning_rate=0.3, schedule=schedule, warmup=0.2), 10)
  rates = np.asarray([rate(step) for step in range(10)]) / 0.3
  np.testing.assert_allclose(rates[:3], [1 / 3, 2 / 3, 1], rtol=1e-6)  # the first step learns as well
  np.testing.assert_allclose(rates[-1], LAST[schedule], rtol=1e-5)
  assert (np.diff(rates[2:]) <= 0).all() and (np.ptp(rates[2:]) > 0.5) == (schedule != "constant")


def test_updates_are_those_of_pytorch_with_clipping_and_weight_decay():
  random, settings = np.random.default_rng(0), Optimizer(learning_rate=0.1, warmup=0.3, weight_decay=0.2, clip=0.7)
  start = {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in (("a", (3, 5)), ("b", (4,)))}
  steps, theirs = 6, {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
  peer = torch.optim.AdamW(theirs.values(), weight_decay=settings.weight_decay)
  optimizer, rate = make_optimizer(settings, steps), make_schedule(settings, steps)
  ours = jax.tree.map(jnp.asarray, start)
  state, norms = optimizer.init(ours), []
  for step in range(steps):
    scale = 10.0 ** (step % 3 - 2)  # some of them are clipped
    gradients = {name: (scale * random.normal(0, 1, array.shape)).astype(np.float32) for name, array in start.items()}
    updates, state = optimizer.update(gradients, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    for name, parameter in theirs.items():
      parameter.grad = torch.tensor(gradients[name])
    norms.append(torch.nn.utils.clip_grad_norm_(theirs.values(), settings.clip).item())
    peer.param_groups[0]["lr"] = float(rate(step))
    peer.step()
    for name, parameter in theirs.items():
      np.testing.assert_allclose(ours[name], parameter.detach().numpy(), atol=1e-5, err_msg=f"{name} after {step}")
  assert min(norms) < settings.clip < max(norms)

"""Sampling against a brute-force loop, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tsalign_jax.config import Policy, Sampling
from tsalign_jax.models.loading import language_model
from tsalign_jax.sampling.draw import draw
from tsalign_jax.sampling.engine import branch_keys, build_sampler
from tsalign_jax.types import Finish

STOP = (2, 5)
SAMPLING = Sampling(responses=3, max_new_tokens=12, batch_prompts=4, temperature=0.8, top_p=0.95)
PROMPTS = [(7, [5, 6, 7]), (11, [9, 10, 11, 12, 13]), (13, [20]), (17, [30, 31]), (19, [40, 41, 42])]
KEY = jax.random.key(0)
one_token = jax.jit(lambda logits, key: draw(logits, key, SAMPLING))


@pytest.fixture(params=["unrolled", "stacked"])
def layout(request):
  return request.param


def handle(folder, layout="unrolled"):
  return language_model(Policy(path=folder, dtype="float32", layout=layout))


def sample(model, mesh, groups, sampling=SAMPLING):
  sampler = build_sampler(model, mesh, sampling, STOP)
  return [row for group in sampler.run(model.load(mesh), groups, KEY) for row in group]


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_sampling_equals_a_loop_over_the_whole_sequence(family, layout, tmp_path, one_device):
  peer = tiny.decoder(family, tmp_path)
  ours = sample(handle(tmp_path, layout), one_device, [PROMPTS[:2]])
  for (prompt_id, prompt), responses in zip(PROMPTS, ours, strict=False):
    keys = branch_keys(KEY, jnp.asarray([prompt_id]), 3)[0]
    for key, response in zip(keys, responses, strict=True):
      tokens, logprob = list(prompt), 0.0
      for step in range(SAMPLING.max_new_tokens):
        logits = peer(torch.tensor([tokens])).logits[0, -1].detach()
        token = int(one_token(logits.numpy()[None], jax.random.fold_in(key, step)[None])[0])
        logprob += torch.log_softmax(logits, -1)[token].item()
        tokens.append(token)
        if token in STOP:
          break
      assert response.tokens == tokens[len(prompt) :]
      assert response.logprob == pytest.approx(logprob, abs=1e-3)
      assert response.finish == (Finish.STOP if tokens[-1] in STOP else Finish.LENGTH)


def test_responses_do_not_depend_on_grouping_or_batch_size(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = handle(tmp_path)
  together = sample(model, one_device, [PROMPTS[:4], PROMPTS[4:]])
  apart = sample(model, one_device, [PROMPTS[4:], PROMPTS[2:4], PROMPTS[:2]])
  alone = sample(model, one_device, [[p] for p in PROMPTS], SAMPLING.model_copy(update={"batch_prompts": 1}))
  assert _close(together, apart[3:] + apart[1:3] + apart[:1])
  assert _close(together, alone)


def test_sampling_over_eight_devices_equals_one(tmp_path, one_device, eight_devices):
  tiny.decoder("llama", tmp_path)
  model = handle(tmp_path)
  assert _close(sample(model, eight_devices, [PROMPTS[:4]]), sample(model, one_device, [PROMPTS[:4]]))


def test_a_batch_of_finished_branches_stops_early(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = handle(tmp_path)
  every = tuple(range(97))  # whatever is drawn first ends the response
  sampler = build_sampler(model, one_device, SAMPLING, every)
  (group,) = sampler.run(model.load(one_device), [PROMPTS[:4]], KEY)
  assert all(len(r.tokens) == 1 and r.finish == Finish.STOP for row in group for r in row)


def test_different_branches_and_prompts_get_different_responses(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  rows = sample(handle(tmp_path), one_device, [[(1, [5, 6]), (2, [5, 6])]])
  texts = {tuple(response.tokens) for row in rows for response in row}
  assert len(texts) == 6


def _close(a, b):
  pairs = [(x, y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
  same = all(x.tokens == y.tokens and x.finish == y.finish for x, y in pairs)
  return same and np.allclose([x.logprob for x, _ in pairs], [y.logprob for _, y in pairs], atol=1e-4)

"""The head that is fitted alone: the optimum of its loss, and the rewards that it gives in its model."""

import jax
import numpy as np
import pytest
import tiny

from tsalign_jax.config import Student
from tsalign_jax.models.loading import reward_model
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.training import reward
from tsalign_jax.training.probe import fit_head, logistic
from tsalign_jax.types import PreferencePair, UserError


def loss(weights, difference, margins, penalty):
  return np.logaddexp(0.0, margins - difference @ weights).sum() + penalty / 2 * weights @ weights


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("features", "widest"), [(8, 2.0), (8, 10.0), (20, 4.0), (60, 4.0)])
def test_the_weights_are_those_of_the_least_loss(features, widest, penalty):
  random = np.random.default_rng(0)
  difference, margins = random.normal(0, 2, (60, features)), random.uniform(0, widest, 60)
  best = logistic(difference, margins, penalty)
  for _ in range(50):
    step = random.normal(0, 1e-3, features)
    assert loss(best, difference, margins, penalty) < loss(best + step, difference, margins, penalty)


def test_features_that_are_not_finite_are_refused():
  difference = np.random.default_rng(0).normal(0, 2, (60, 8))
  difference[7, 3] = np.nan
  with np.errstate(invalid="ignore"), pytest.raises(UserError, match=r"^probe: no head fits"):
    logistic(difference, np.zeros(60), 1.0)


def test_what_can_be_learned_is_and_noise_is_not():
  """Two hundred features of which one tells, in its own unit, which response is better."""
  random = np.random.default_rng(0)
  worse, better = random.normal(0, 1, (2, 400, 200)).astype(np.float32)
  nothing, prompts = np.zeros(400, np.float32), range(400)
  _, guessed = fit_head(better, worse, nothing, prompts)
  assert 0.4 < guessed < 0.6
  better[:, 7] += 5.0
  scale = np.where(np.arange(200) == 7, 1e4, 1.0).astype(np.float32)
  head, share = fit_head(better * scale, worse * scale, nothing, prompts)
  assert share > 0.9 and np.argmax(np.abs(head * scale)) == 7


def test_pairs_of_one_prompt_are_left_out_together():
  """Six noisy copies of each pair: whoever saw one knows what is right of the others, and no more."""
  random, prompts = np.random.default_rng(3), np.repeat(np.arange(40), 6)
  better, worse = (
    random.normal(0, 1, (40, 60)).astype(np.float32)[prompts] + random.normal(0, 0.1, (240, 60)).astype(np.float32)
    for _ in range(2)
  )
  shuffled = random.permutation(240)
  data = better[shuffled], worse[shuffled], np.zeros(240, np.float32)
  _, known = fit_head(*data, range(240))
  _, guessed = fit_head(*data, prompts[shuffled].tolist())
  assert known > 0.95 and guessed < 0.7


@pytest.mark.parametrize("family", ["qwen3", "bert", "modernbert"])
def test_the_fitted_head_orders_pairs_in_its_model_and_is_fitted_once(family, tmp_path, one_device, monkeypatch):
  (tiny.encoder if family in tiny.ENCODERS else tiny.decoder)(family, tmp_path)
  (tiny.bert_tokenizer if family in tiny.ENCODERS else tiny.tokenizer)(tmp_path)
  settings = Student(path=tmp_path, dtype="float32", max_tokens=100)
  model = reward_model(settings)
  engine, params = build_reward_engine(model, one_device, settings), model.load(one_device, head_key=jax.random.key(0))
  pairs = [
    PreferencePair([{"role": "user", "content": first}], f"{second} sun", f"{second} rain")
    for first, second in zip(tiny.WORDS[:24], tiny.WORDS[30:54], strict=True)
  ]
  examples = [reward.make_example(engine, pair) for pair in pairs]
  file = tmp_path / "probe.npz"
  read = []
  fitted = reward.probed(engine, params, examples, 256, file, read.append)
  assert read[-1] == len(pairs)
  changed = [name for name in params if not np.array_equal(params[name], fitted[name])]
  assert changed == [model.head_kernel]
  scores = dict(engine.score(fitted, [example.item for example in examples]))
  right = np.mean([better > worse for better, worse in scores.values()])
  assert right > 0.9 and reward.left_out_accuracy(file) > 0.7
  # The rewards are linear in what the probe was fitted to.
  features = reward._features(engine, params, [example.item for example in examples], 256, read.append)
  margins = (features[:, 0] - features[:, 1]) @ np.asarray(fitted[model.head_kernel])[:, 0]
  np.testing.assert_allclose([better - worse for better, worse in map(scores.get, range(24))], margins, atol=1e-4)

  monkeypatch.setattr(reward, "_features", None)
  again = reward.probed(engine, params, examples, 256, file, read.append)
  np.testing.assert_array_equal(again[model.head_kernel], fitted[model.head_kernel])

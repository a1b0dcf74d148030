"""The loss of a reward model and its gradient, against the formula of TRL's RewardTrainer in PyTorch."""

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch.nn.functional import logsigmoid, relu

from tsalign_jax.config import LoRA, RewardTraining, Student
from tsalign_jax.models.hf import hf_tensors
from tsalign_jax.models.loading import reward_model
from tsalign_jax.models.lora import trained_part
from tsalign_jax.scoring.reward import build_reward_engine, conversation_text
from tsalign_jax.training.optimizer import build_trainer, fetch
from tsalign_jax.training.reward import Examples, build_loss, make_example, pair_losses
from tsalign_jax.types import PreferencePair

PAIRS = [
  PreferencePair(
    [{"role": "user", "content": " ".join(tiny.WORDS[n : n + 3 + n % 4])}],
    " ".join(tiny.WORDS[2 * n : 2 * n + 1 + 3 * n % 7]),
    " ".join(tiny.WORDS[n + 30 : n + 31 + 5 * n % 8]),
    margin=n % 3 / 2,
  )
  for n in range(14)
]
LOSSES = {
  "plain": {},
  "centred": {"center_rewards_coefficient": 0.3},
  "smoothed": {"label_smoothing": 0.2},
  "all": {"center_rewards_coefficient": 0.3, "label_smoothing": 0.2},
  "hinge": {"loss": "margin", "margin": 1.5},
  "all of the hinge": {"loss": "margin", "label_smoothing": 0.2, "center_rewards_coefficient": 0.3},
}


def torch_loss(chosen, rejected, margins, settings: dict):
  """TRL's, line by line, where nothing is smoothed; smoothing is the expectation over which of the two is better."""

  def one_way(difference):
    if settings.get("loss") == "margin":
      return relu(settings.get("margin", 1.0) + margins - difference).mean()
    return -logsigmoid(difference - margins).mean()

  wrong = settings.get("label_smoothing", 0.0)
  loss = (1 - wrong) * one_way(chosen - rejected) + wrong * one_way(rejected - chosen)
  return loss + settings.get("center_rewards_coefficient", 0.0) * torch.mean((chosen + rejected) ** 2)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_of_scores_equal_pytorch(name):
  random = np.random.default_rng(0)
  rewards, margins = random.normal(0, 2, (64, 2)).astype(np.float32), random.uniform(0, 2, 64).astype(np.float32)
  settings = RewardTraining(**LOSSES[name])
  value, gradient = jax.value_and_grad(lambda rewards: pair_losses(rewards, margins, settings).mean())(rewards)
  theirs = torch.tensor(rewards, requires_grad=True)
  expected = torch_loss(theirs[:, 0], theirs[:, 1], torch.tensor(margins), LOSSES[name])
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


def reward_folder(family, folder):
  """A tiny reward model with its tokenizer; returns the PyTorch model, and how it reads a response."""
  if family in tiny.ENCODERS:
    peer = tiny.encoder(family, folder, reward=True)
    tiny.bert_tokenizer(folder)
  else:
    peer = tiny.decoder(family, folder, reward=True)
    tiny.tokenizer(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def inputs(prompt, response):
    if not tokenizer.chat_template:
      return tokenizer([conversation_text(prompt)], [response], return_tensors="pt")
    messages = [*prompt, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")

  return peer, inputs


def engine_of(folder, mesh):
  settings = Student(path=folder, dtype="float32", max_tokens=100)
  model = reward_model(settings)
  return build_reward_engine(model, mesh, settings), model.load(mesh)


@pytest.mark.parametrize("tokens", [1 << 20, 256], ids=["at once", "in parts"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "bert"])
def test_loss_and_gradient_of_weights_equal_pytorch(family, tokens, tmp_path, one_device):
  peer, inputs = reward_folder(family, tmp_path)
  engine, params = engine_of(tmp_path, one_device)
  settings = RewardTraining(clip=1e9, microbatch_tokens=tokens, **LOSSES["all"])
  examples = [make_example(engine, pair) for pair in PAIRS]
  parts = list(Examples(engine, examples, settings).parts(range(len(examples))))
  assert (len(parts) > 1) == (tokens == 256)
  trainer = build_trainer(build_loss(engine, settings), settings, 1, engine.model.skeleton, one_device)
  gradients, metrics = trainer.gradients(trainer.start(params), {}, parts)

  texts = [(pair.prompt, text) for pair in PAIRS for text in (pair.chosen, pair.rejected)]
  scores = torch.stack([peer(**inputs(*each)).logits[0, 0] for each in texts])
  chosen, rejected = scores[::2], scores[1::2]
  expected = torch_loss(chosen, rejected, torch.tensor([pair.margin for pair in PAIRS]), LOSSES["all"])
  expected.backward()
  found = fetch(metrics)
  assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
  assert found["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-4)
  assert found["mean_reward"] == pytest.approx(scores.mean().item(), abs=1e-4)
  assert found["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
  theirs = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters() if parameter.grad is not None}
  model = engine.model
  ours = {name: tensor.read() for name, tensor in hf_tensors(gradients, model.skeleton, model.config, np.float32)}
  assert set(theirs) <= set(ours)
  scale = max(np.linalg.norm(gradient) for gradient in theirs.values())
  for name, gradient in theirs.items():
    assert np.linalg.norm(ours[name] - gradient) <= 1e-4 * np.linalg.norm(gradient) + 1e-6 * scale, name


def test_trainings_of_one_objective_share_a_program(tmp_path, one_device):
  reward_folder("bert", tmp_path)
  engine, _ = engine_of(tmp_path, one_device)
  warm, later = RewardTraining(epochs=1, learning_rate=1e-3), RewardTraining(epochs=3, batch_size=4)
  assert build_loss(engine, warm) is build_loss(engine, later)
  for name, settings in LOSSES.items():
    if name != "plain":
      assert build_loss(engine, RewardTraining(**settings)) is not build_loss(engine, warm), name


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_adapters_and_head_learn_and_merge_into_what_they_were(family, tmp_path, one_device):
  reward_folder(family, tmp_path)
  engine, params = engine_of(tmp_path, one_device)
  settings = RewardTraining(learning_rate=1e-2, lora=LoRA(rank=2), warmup=0.0, schedule="constant")
  part = trained_part(engine.model, settings.lora, lambda: params, jax.random.key(0), one_device)
  trainer = build_trainer(build_loss(engine, settings), settings, 8, part.skeleton, one_device)
  examples = [make_example(engine, pair._replace(margin=0.0)) for pair in PAIRS]
  state, log = trainer.start(part.load()), []
  everything = list(Examples(engine, examples, settings).parts(range(len(PAIRS))))
  for _ in range(8):
    state, metrics = trainer.step(state, part.frozen, everything)
    log.append(fetch(metrics))
  assert log[-1]["loss"] < 0.7 * log[0]["loss"]
  trainable = state.trainable
  _, adapted = jax.jit(build_loss(engine, settings))(trainable, part.frozen, *everything)
  whole = part.whole(trainable)
  assert set(whole) == set(engine.model.skeleton.specs)
  scores = dict(engine.score(whole, [example.item for example in examples]))
  merged = np.mean([first - second for first, second in scores.values()])
  assert merged == pytest.approx(float(adapted["margin"]), abs=1e-3)

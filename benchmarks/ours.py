"""Our side of every benchmark: the engines that the stages use, called as the stages call them.

`Sampler`, `Scorer` and `Trainer` make the calls; the contenders below them only count the work.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsalign_jax import config
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.packing import Item, Packing
from tsalign_jax.host_memory import give_back, give_back_after_compiling
from tsalign_jax.models.functional import Params
from tsalign_jax.models.loading import ModelHandle, language_model, reward_model, wide
from tsalign_jax.pairing.mine import best_worst, usable
from tsalign_jax.parallel.mesh import batch_ways, make_mesh
from tsalign_jax.sampling.engine import Sampled, build_sampler
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.training.align import build_loss, build_reference, known_logps, make_batches
from tsalign_jax.training.optimizer import State, build_trainer, fetch
from tsalign_jax.training.run import in_order

PACKAGES = ("tsalign_jax", "jax")

jax.monitoring.register_event_duration_secs_listener(give_back_after_compiling)  # as a run does it


class Sampler:
  """K responses to each prompt, as the `sample` stage gets them."""

  def __init__(self, model: ModelHandle, work: Mapping[str, Any], batch_prompts: int, lanes: int | None = None):
    self.prompts = work["prompts"]
    settings = config.Sampling(max_new_tokens=work["max_new_tokens"], batch_prompts=batch_prompts, lanes=lanes)
    settings = settings.model_copy(update={"responses": work["responses"]})  # may be 1, which a run may not ask for
    self.sampler = build_sampler(model, make_mesh(), settings, tuple(work["stop"]))

  def __call__(self, params: Params, seed: int) -> list[list[Sampled]]:
    """The responses of each prompt, in the order of the prompts."""
    harvests = self.sampler.run(params, list(enumerate(self.prompts)), jax.random.key(seed))
    answers = dict(answer for harvest in harvests for answer in harvest)
    return [answers[index] for index in range(len(self.prompts))]


class Scorer:
  """A score for each response, as the `score` stage gets them: from text."""

  def __init__(self, folder: str, batch_tokens: int, max_tokens: int):
    settings = config.Student(path=folder, param_dtype="bfloat16", batch_tokens=batch_tokens, max_tokens=max_tokens)
    model, mesh = reward_model(settings), make_mesh()
    self.engine = build_reward_engine(model, mesh, settings)
    self.params = model.load(mesh)

  def encode(self, prompts: Sequence, responses: Sequence[Sequence[str]]):
    """Tokens."""
    return [self.engine.encode(*each) for each in zip(prompts, responses, strict=True)]

  def __call__(self, items: Sequence) -> list[list[float]]:
    """The scores of each prompt's responses."""
    scores = dict(self.engine.score(self.params, items))
    return [scores[index] for index in range(len(items))]


class Trainer:
  """DPO over pairs, as the `align` stage does it: the reference first, then steps in the order of the pairs."""

  def __init__(self, model: ModelHandle, work: Mapping[str, Any], microbatch_tokens: int):
    self.model, self.mesh = model, make_mesh()
    self.settings = config.Align(
      learning_rate=work["learning_rate"],
      beta=work["beta"],
      batch_size=work["batch_size"],
      microbatch_tokens=microbatch_tokens,
      schedule="constant",
      warmup=0.0,
    )
    self.reference = build_reference(model, self.mesh)
    loss = build_loss(model, self.mesh, self.settings)
    self.trainer = build_trainer(loss, self.settings, 1, model.skeleton, self.mesh)

  def pack(self, pairs: Sequence[Item]) -> Packing:
    """The pairs, ready to be laid into batches."""
    return Packing(pairs, self.settings.batch_size, self.settings.microbatch_tokens, batch_ways(self.mesh))

  def reference_logps(self, params: Params, packing: Packing) -> np.ndarray:
    """[pairs, 2], of the frozen policy."""
    return known_logps(self.reference, params, packing, self._steps(packing), self.mesh)

  def epoch(self, state: State, packing: Packing, reference: np.ndarray) -> tuple[State, list[dict[str, float]]]:
    """The state, and metrics of each step, after one pass over the pairs."""
    log = []
    for step in self._steps(packing):
      parts = make_batches(packing, step, reference, self.mesh)
      state, metrics = self.trainer.step(state, {}, parts)
      log.append(metrics)
    return state, [fetch(metrics) for metrics in log]

  def _steps(self, packing: Packing) -> list[range]:
    return in_order(len(packing.items), self.settings.batch_size)


class Sampling:
  """Useful tokens: up to the end token, with it."""

  packages = PACKAGES

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.model = language_model(config.Policy(path=Path(work["policy"]), param_dtype="bfloat16"))
    self.sampler = Sampler(self.model, work, **settings)
    self.params = self.model.load(make_mesh())
    self.run(0)

  def run(self, seed: int) -> dict[str, float]:
    """Samples every response once."""
    lengths = [len(sampled.tokens) for row in self.sampler(self.params, seed) for sampled in row]
    return {"units": sum(lengths), "responses": len(lengths), "tokens_a_response": float(np.mean(lengths))}


class Answers(Sampling):
  """The same, but for the texts."""

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.chat = Chat.load(Path(work["policy"]))
    super().__init__(work, {"batch_prompts": 16})

  def run(self, seed: int) -> dict[str, Any]:
    """The texts of the responses to each prompt."""
    return {"texts": [[self.chat.text(each.tokens) for each in row] for row in self.sampler(self.params, seed)]}


class Scoring:
  """Sequences: a prompt with one of its responses."""

  packages = PACKAGES

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.items = work["items"]
    self.scorer = Scorer(work["model"], settings["batch_tokens"], work["max_tokens"])
    items = self._encode()
    tokens = sum(len(item.prompt) + len(response) for item in items for response in item.responses)
    self.check = {"tokens": tokens, "scores": self.scorer(items)}

  def run(self, seed: int) -> dict[str, float]:
    """Scores everything once, tokenising included."""
    return {"units": sum(map(len, self.scorer(self._encode())))}

  def _encode(self):
    return self.scorer.encode([item["messages"] for item in self.items], [item["responses"] for item in self.items])


class Dpo:
  """Pairs, in steps whose reference log-probabilities are known."""

  packages = PACKAGES

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    model = language_model(config.Policy(path=Path(work["policy"]), remat=settings["remat"]))
    self.trainer = Trainer(model, work, settings["microbatch_tokens"])
    pairs = [Item(row["prompt_tokens"], (row["chosen_tokens"], row["rejected_tokens"])) for row in work["pairs"]]
    self.packing = self.trainer.pack(pairs)
    params = model.load(make_mesh())
    self.reference = self.trainer.reference_logps(params, self.packing)
    self.state = self.trainer.trainer.start(wide(params))
    del params
    first = self._epoch()[0]
    sides = [row["prompt_tokens"] + row[f"{side}_tokens"] for row in work["pairs"] for side in ("chosen", "rejected")]
    wanted = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    self.check = {"tokens": sum(map(len, sides))} | {name: float(first[name]) for name in wanted}

  def run(self, seed: int) -> dict[str, float]:
    """One pass over the pairs."""
    self._epoch()
    return {"units": len(self.packing.items)}

  def _epoch(self) -> list[dict[str, float]]:
    self.state, log = self.trainer.epoch(self.state, self.packing, self.reference)
    return log


class Round:
  """Prompts of a whole round: sampled, scored, paired by score, trained on. Each round begins with the same policy."""

  packages = PACKAGES

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.chat, self.messages = Chat.load(Path(work["policy"])), work["messages"]
    self.model = language_model(config.Policy(path=Path(work["policy"])))
    self.sampler = Sampler(self.model, work, settings["batch_prompts"])
    self.scorer = Scorer(work["reward"], settings["batch_tokens"], work["max_tokens"])
    self.trainer = Trainer(self.model, work, settings["microbatch_tokens"])
    self.params = self.model.load(make_mesh())
    self.run(0)

  def run(self, seed: int) -> dict[str, float]:
    """One round; memory is given back after each stage, as a run does it."""
    answers = self.sampler(self.params, seed)
    give_back()
    texts = [[self.chat.text(sampled.tokens) for sampled in row] for row in answers]
    pairs = self._pairs(answers, texts, self.scorer(self.scorer.encode(self.messages, texts)))
    give_back()
    packing = self.trainer.pack(pairs)
    reference = self.trainer.reference_logps(self.params, packing)
    trainable = {name: jnp.copy(array) for name, array in wide(self.params).items()}  # as training takes what it gets
    jax.block_until_ready(self.trainer.epoch(self.trainer.trainer.start(trainable), packing, reference))
    give_back()
    lengths = [len(sampled.tokens) for row in answers for sampled in row]
    mean = float(np.mean(lengths))
    return {"units": len(answers), "responses": len(lengths), "pairs": len(pairs), "tokens_a_response": mean}

  def _pairs(self, answers: list[list[Sampled]], texts: list[list[str]], scores: list[list[float]]) -> list[Item]:
    pairs = []
    for tokens, row, words, marks in zip(self.sampler.prompts, answers, texts, scores, strict=True):
      indices = usable(words, [sampled.finish for sampled in row], drop_truncated=False)
      found = indices if isinstance(indices, str) else best_worst(indices, marks, min_margin=0.0)
      if not isinstance(found, str):
        pairs.append(Item(tokens, (row[found.first].tokens, row[found.second].tokens)))
    return pairs

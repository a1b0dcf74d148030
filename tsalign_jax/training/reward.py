"""Training of a reward model: rank a pair as whoever labelled it did, whether student or teacher-to-be."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tsalign_jax.config import Optimizer, RewardTraining
from tsalign_jax.data.files import prompt_key
from tsalign_jax.models.functional import Params
from tsalign_jax.models.lora import adapted_skeleton, trained_part
from tsalign_jax.objectives import ranking
from tsalign_jax.parallel.mesh import pipelined, put_batch
from tsalign_jax.scoring.reward import Encoded, RewardEngine
from tsalign_jax.training.optimizer import build_trainer
from tsalign_jax.training.probe import fit_head
from tsalign_jax.training.run import train, training_steps
from tsalign_jax.types import PreferencePair


class Example(NamedTuple):
  """A pair as tokens, better response first, and by how much the score of the better one should be ahead."""

  item: Encoded
  margin: float
  prompt: str  # the same for pairs of one prompt


class RewardBatch(NamedTuple):
  """Pairs as the engine lays them out (better one first), their margins, and 1 / (pairs in the step), 0 for none."""

  pairs: Any
  margin: Float[Array, "*places"]
  weight: Float[Array, "*places"]


def make_example(engine: RewardEngine, pair: PreferencePair) -> Example:
  """The pair as this model reads it."""
  return Example(engine.encode(pair.prompt, [pair.chosen, pair.rejected]), pair.margin, prompt_key(pair.prompt))


class Examples:
  """The pairs of a training, laid into batches of about so many tokens."""

  def __init__(self, engine: RewardEngine, examples: Sequence[Example], settings: RewardTraining):
    self._mesh = engine.mesh
    self._margins = np.asarray([example.margin for example in examples], np.float32)
    items, at_once = [example.item for example in examples], min(settings.batch_size, len(examples))
    self._laid_out = engine.lay_out(items, at_once, settings.microbatch_tokens)

  def parts(self, step: Sequence[int]) -> Iterator[RewardBatch]:
    """The microbatches of a step over these pairs, on the device."""
    for batch, place in self._laid_out.batches(step):
      weight = np.where(place >= 0, np.float32(1 / len(step)), np.float32(0))
      yield put_batch(RewardBatch(batch, self._margins[place], weight), self._mesh)


OBJECTIVE = RewardTraining.model_fields.keys() - Optimizer.model_fields.keys()


def build_loss(engine: RewardEngine, settings: RewardTraining):
  """The loss of a microbatch, with the share of pairs that the model already orders as they are labelled.

  Trainings that differ in nothing of it, a warm start and the rounds behind it, share one compiled program.
  """
  return _build_loss(engine, RewardTraining(**{name: getattr(settings, name) for name in OBJECTIVE}))


def probed(
  engine: RewardEngine,
  params: Params,
  examples: Sequence[Example],
  tokens: int,
  file: Path,
  on_pairs: Callable[[int], None],
) -> dict[str, jax.Array]:
  """The parameters with the head that suits these pairs best: see `training.probe`.

  It is kept in `file`, with how often heads are right of pairs that were left out of their fit; what is there is read.
  `on_pairs` is told how many pairs the backbone has read so far.
  """
  if not file.exists():
    both = _features(engine, params, [example.item for example in examples], tokens, on_pairs)
    margins, prompts = np.asarray([example.margin for example in examples]), [example.prompt for example in examples]
    head, share = fit_head(both[:, 0], both[:, 1], margins, prompts)
    with file.with_name("unfinished.npz").open("wb") as unfinished:
      np.savez(unfinished, head=head, share=share)
    file.with_name("unfinished.npz").replace(file)
  name = engine.model.head_kernel
  head = np.load(file)["head"][:, None].astype(params[name].dtype)
  return {**params, name: jax.device_put(head, params[name].sharding)}


def left_out_accuracy(file: Path) -> float:
  """What `probed` found: the share of pairs that heads fitted without them order as they are labelled."""
  return float(np.load(file)["share"])


def _features(
  engine: RewardEngine, params: Params, items: Sequence[Encoded], tokens: int, on_pairs: Callable[[int], None]
) -> Float[np.ndarray, "items 2 features"]:
  """Features of the better and of the worse response."""
  out, read = None, 0
  batches = engine.lay_out(items, len(items), tokens).batches(range(len(items)))
  launched = ((place, engine.feature_program(params, put_batch(batch, engine.mesh))) for batch, place in batches)
  for place, found in pipelined(launched):
    found = np.asarray(found)
    out = np.zeros((len(items), *found.shape[-2:]), np.float32) if out is None else out
    out[place[place >= 0]] = found[place >= 0]
    read += int((place >= 0).sum())
    on_pairs(read)
  return out


@functools.lru_cache(maxsize=8)
def _build_loss(engine: RewardEngine, settings: RewardTraining):
  skeleton = adapted_skeleton(engine.model, settings.lora)

  def loss(trainable: Params, frozen: Params, batch: RewardBatch):
    rewards = engine.rewards(skeleton.bind({**frozen, **trainable}), batch.pairs)
    rewards, margin, weight = rewards.reshape(-1, 2), batch.margin.reshape(-1), batch.weight.reshape(-1)
    losses = pair_losses(rewards, margin, settings)
    metrics = {
      "loss": losses,
      "accuracy": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
      "margin": rewards[:, 0] - rewards[:, 1],
      "mean_reward": rewards.mean(axis=1),
    }
    total = {name: jnp.sum(weight * value) for name, value in metrics.items()}
    return total["loss"], total

  return loss


def pair_losses(
  rewards: Float[Array, "batch 2"], margins: Float[Array, " batch"], settings: RewardTraining
) -> Float[Array, " batch"]:
  """The loss of each pair as the settings compose it."""
  if settings.loss == "bradley_terry":
    base = functools.partial(ranking.bradley_terry, margins=margins)
  else:
    base = functools.partial(ranking.margin_ranking, margins=margins + settings.margin)
  losses = ranking.smoothed(base, rewards, label_smoothing=settings.label_smoothing)
  return losses + settings.center_rewards_coefficient * ranking.centring(rewards)


def fit(
  engine: RewardEngine,
  examples: Sequence[Example],
  settings: RewardTraining,
  load: Callable[[], Params],
  *,
  section: str,
  seed: int,
  folder: Path,
  on_step: Callable[[int, Mapping[str, float]], None],
  on_resume: Callable[[int], None],
) -> dict[str, jax.Array]:
  """The model's parameters after training on these pairs, in the dtype in which they are kept, adapters merged.

  `load` gives the parameters to start from; `folder` holds checkpoints and log, from which a killed training goes on.
  `section`, `on_step` and `on_resume` are those of `train`.
  """
  model, steps = engine.model, training_steps(len(examples), settings)
  part = trained_part(model, settings.lora, load, jax.random.key(seed), engine.mesh)
  trained = train(
    build_trainer(build_loss(engine, settings), settings, steps, part.skeleton, engine.mesh),
    settings,
    part.abstract(engine.mesh),
    part.load,
    part.frozen,
    Examples(engine, examples, settings).parts,
    section=section,
    pairs=len(examples),
    seed=seed,
    folder=folder,
    on_step=on_step,
    on_resume=on_resume,
  )
  return model.stored(part.whole(trained))

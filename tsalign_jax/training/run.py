"""Training over pairs: the order of the data, steps, the log, and resuming in the middle."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from tsalign_jax.config import Optimizer
from tsalign_jax.models.functional import Params
from tsalign_jax.training.checkpoints import StepCheckpoints
from tsalign_jax.training.optimizer import Trainer

MakeMicrobatch = Callable[[Sequence[int], np.ndarray], Any]  # (pair indices, weights) -> device batch


def training_steps(pairs: int, settings: Optimizer) -> int:
  """Optimizer steps over this many pairs."""
  return max(1, math.ceil(pairs * settings.epochs / settings.batch_size))


def batches_of(pairs: int, settings: Optimizer, seed: int) -> grain.DatasetIterator:
  """Batches of pair indices, reshuffled each epoch; its state can be saved and restored."""
  indices = grain.MapDataset.range(pairs).seed(seed).shuffle().repeat(settings.epochs)
  return iter(indices.batch(settings.batch_size).to_iter_dataset())


def microbatches(indices: Sequence[int], size: int) -> Iterator[tuple[list[int], np.ndarray]]:
  """A batch in parts of `size`; a short part is filled up with pairs of weight 0. Weights add up to 1."""
  weight = 1.0 / len(indices)
  for start in range(0, len(indices), size):
    part = [int(index) for index in indices[start : start + size]]
    weights = np.zeros(size, np.float32)
    weights[: len(part)] = weight
    yield part + [part[0]] * (size - len(part)), weights


def train(
  trainer: Trainer,
  settings: Optimizer,
  trainable: Params,
  frozen: Params,
  make_microbatch: MakeMicrobatch,
  *,
  pairs: int,
  seed: int,
  folder: Path,
  microbatch: int,
  on_step: Callable[[int, dict[str, float]], None],
) -> Params:
  """The trained parameters. Killed at any point and called again with the same `folder`, it ends the same.

  `trainable` is donated. `folder` holds checkpoints and `log.jsonl`, one line a step.
  """
  data, opt_state, done = batches_of(pairs, settings, seed), trainer.init(trainable), 0
  with StepCheckpoints(folder / "steps", settings.checkpoint_every) as checkpoints:
    if saved := checkpoints.latest(trainable, opt_state):
      done, trainable, opt_state, iterator = saved
      data.set_state(iterator)
    log = _open_log(folder / "log.jsonl", done)
    pending = None
    for step, indices in enumerate(data, done):
      parts = (make_microbatch(*part) for part in microbatches(indices, microbatch))
      trainable, opt_state, metrics = trainer.step(trainable, frozen, opt_state, parts)
      if pending:
        _book(log, trainer, *pending, on_step)
      pending = (step, metrics)  # fetched one step late, so that the device never waits for the host
      if (step + 1) % settings.checkpoint_every == 0:
        _book(log, trainer, *pending, on_step)
        pending = None
        checkpoints.save(step + 1, trainable, opt_state, data.get_state())
    if pending:
      _book(log, trainer, *pending, on_step)
    log.close()
  return trainable


def _book(log, trainer: Trainer, step: int, metrics, on_step) -> None:
  values = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
  values["learning_rate"] = float(trainer.schedule(step))
  on_step(step, values)
  log.write(json.dumps({"step": step, **values}) + "\n")
  log.flush()


def _open_log(path: Path, done: int):
  """The log, without the lines of steps that a crash undid."""
  lines = path.read_text().splitlines() if path.exists() else []
  path.write_text("".join(line + "\n" for line in lines[:done]))
  return path.open("a")

"""Training over pairs: the order of the data, steps, the log, and resuming in the middle."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax

from tsalign_jax.config import Optimizer
from tsalign_jax.models.functional import Params
from tsalign_jax.training.checkpoints import StepCheckpoints
from tsalign_jax.training.optimizer import Trainer, fetch
from tsalign_jax.types import UserError

MakeParts = Callable[[Sequence[int]], Iterator[Any]]  # the pairs of a step, by index -> its microbatches on the device


def training_steps(pairs: int, settings: Optimizer) -> int:
  """Optimizer steps over this many pairs."""
  return max(1, math.ceil(pairs * settings.epochs / settings.batch_size))


def in_order(pairs: int, size: int) -> list[range]:
  """The steps of one pass over the pairs as they come."""
  return [range(start, min(start + size, pairs)) for start in range(0, pairs, size)]


def batches_of(pairs: int, settings: Optimizer, seed: int) -> grain.DatasetIterator:
  """Batches of pair indices, reshuffled each epoch; its state can be saved and restored."""
  indices = grain.MapDataset.range(pairs).seed(seed).shuffle().repeat(settings.epochs)
  return iter(indices.batch(settings.batch_size).to_iter_dataset())


def train(
  trainer: Trainer,
  settings: Optimizer,
  abstract: Mapping[str, jax.ShapeDtypeStruct],
  load: Callable[[], Params],
  frozen: Params,
  make_parts: MakeParts,
  *,
  section: str,
  pairs: int,
  seed: int,
  folder: Path,
  on_step: Callable[[int, dict[str, float]], None],
  on_resume: Callable[[int], None],
) -> Params:
  """The trained parameters. Killed at any point and called again with the same `folder`, it ends the same.

  `load` gives the parameters to start from and is called only if there is no checkpoint to continue from; `abstract`
  holds their shapes, dtypes and shardings. `folder` holds checkpoints and `log.jsonl`, one line a step. `section` is
  where the settings stand in the configuration; `on_resume` is told how many steps were done before.
  Raises UserError when the loss is no longer a number.
  """
  data, done = batches_of(pairs, settings, seed), 0
  with StepCheckpoints(folder / "steps", settings.checkpoint_every) as checkpoints:
    if saved := checkpoints.latest(abstract, trainer.abstract_state(abstract)):
      done, trainable, opt_state, iterator = saved
      data.set_state(iterator)
      on_resume(done)
      state = trainer.start(trainable, opt_state)
    else:
      state = trainer.start(load())
    log = _open_log(folder / "log.jsonl", done)
    pending = None
    for step, indices in enumerate(data, done):
      state, metrics = trainer.step(state, frozen, make_parts(indices.tolist()))
      if pending:
        _book(log, trainer, section, *pending, on_step)
      pending = (step, metrics)  # fetched one step late, so that the device never waits for the host
      if (step + 1) % settings.checkpoint_every == 0:
        _book(log, trainer, section, *pending, on_step)
        pending = None
        checkpoints.save(step + 1, state.trainable, state.opt_state, data.get_state())
    if pending:
      _book(log, trainer, section, *pending, on_step)
    log.close()
  return state.trainable


def _book(log, trainer: Trainer, section: str, step: int, metrics, on_step) -> None:
  values = fetch(metrics) | {"learning_rate": float(trainer.schedule(step))}
  if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
    raise UserError(
      f"{section}: at step {step} the loss is {values['loss']:.3g}, and its gradient's norm {values['grad_norm']:.3g}; "
      f"begin a run in another folder with a lower {section}.learning_rate"
    )
  on_step(step, values)
  log.write(json.dumps({"step": step, **values}) + "\n")
  log.flush()


def _open_log(path: Path, done: int):
  """The log, without the lines of steps that a crash undid."""
  lines = path.read_text().splitlines() if path.exists() else []
  kept = path.with_suffix(".tmp")
  kept.write_text("".join(line + "\n" for line in lines[:done]))
  kept.replace(path)
  return path.open("a")

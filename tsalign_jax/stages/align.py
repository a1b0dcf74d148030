"""align: the policy learns from the pairs by DPO against a frozen reference."""

import functools
import shutil
from collections.abc import Sequence

import numpy as np

from tsalign_jax.data.packing import Item, Packing
from tsalign_jax.data.tables import read_table
from tsalign_jax.models.checkpoints import save_tree
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.models.lora import trained_part
from tsalign_jax.parallel.mesh import batch_ways
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.training.align import build_loss, build_reference, known_logps, make_batches
from tsalign_jax.training.optimizer import build_trainer
from tsalign_jax.training.run import batches_of, train, training_steps

# Nats a token by which the two programs that compute log-probabilities may differ. On CPUs they do not.
DRIFT_PER_TOKEN = {"float32": 1e-4, "bfloat16": 1e-2}


def align(job: Job) -> Counts:
  """Writes the next policy and the log of its training."""
  model, settings = job.policy(), job.config.align
  rows = read_table(job.reads["pairs"])
  items = [Item(row["prompt_tokens"], (row["chosen_tokens"], row["rejected_tokens"])) for row in rows]
  packing = Packing(items, settings.batch_size, settings.microbatch_tokens, batch_ways(job.mesh))
  steps = training_steps(len(items), settings)
  with job.progress(steps, "steps") as advance:
    advance(0, "reference")
    reference = _reference_logps(job, model, packing)
    part = trained_part(model, settings.lora, lambda: job.load(model, job.reads["policy"]), job.key, job.mesh)

    def on_step(step: int, metrics: dict[str, float]) -> None:
      if step == 0:
        _check_start(job, metrics["logps/drift"], model, items)
      advance(1, f"loss {metrics['loss']:.3f} margin {metrics['rewards/margins']:+.3f}")

    trained = train(
      build_trainer(build_loss(model, job.mesh, settings), settings, steps, part.skeleton, job.mesh),
      settings,
      part.abstract(job.mesh),
      part.load,
      part.frozen,
      lambda step: make_batches(packing, step, reference, job.mesh),
      section="align",
      pairs=len(items),
      seed=job.seed,
      folder=job.partial,
      on_step=on_step,
      on_resume=functools.partial(advance, earlier=True),
    )
  save_tree(job.writes["policy"], model.stored(part.whole(trained)))
  shutil.copyfile(job.partial / "log.jsonl", job.writes["log"])
  return {"pairs": len(items), "steps": steps, "reference": settings.reference}


def _reference_logps(job: Job, model: ModelHandle, packing: Packing) -> np.ndarray:
  """[pairs, 2], computed once; the reference leaves device memory before training begins.

  Pairs are packed as in the first epoch: so the first step sees the very numbers that it computes.
  """
  job.partial.mkdir(parents=True, exist_ok=True)
  file = job.partial / "reference_logps.npy"
  if file.exists():
    return np.load(file)
  program, params = build_reference(model, job.mesh), job.load(model, job.reads["reference"])
  steps = batches_of(len(packing.items), job.config.align, job.seed)
  out = known_logps(program, params, packing, (indices.tolist() for indices in steps), job.mesh)
  np.save(job.partial / "unfinished.npy", out)
  (job.partial / "unfinished.npy").replace(file)
  return out


def _check_start(job: Job, drift: float, model: ModelHandle, items: Sequence[Item]) -> None:
  """Before the first update the policy is its own reference, so every margin is 0 up to rounding."""
  if job.reads["policy"] != job.reads["reference"]:
    return
  per_token = 2 * drift / float(np.mean([item.targets for item in items]))
  if per_token > DRIFT_PER_TOKEN[model.dtype_name]:
    raise RuntimeError(
      f"{job.name}: log-probabilities are {per_token:.2g} nats a token from the reference's at step 0, "
      "before anything was learned; this is a fault of tsalign_jax, please report it with the configuration"
    )

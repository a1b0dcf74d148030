"""align: the policy learns from the pairs by DPO against a frozen reference."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from tsalign_jax.data.batching import make_branches, round_up
from tsalign_jax.data.tables import Rows, read_table
from tsalign_jax.models.checkpoints import save_tree
from tsalign_jax.models.loading import ModelHandle, wide
from tsalign_jax.models.lora import adapted_skeleton, is_adapter, merge
from tsalign_jax.parallel.mesh import batch_ways, put_batch
from tsalign_jax.stages.base import Counts, Job
from tsalign_jax.training.align import AlignBatch, build_loss, build_reference
from tsalign_jax.training.optimizer import build_trainer
from tsalign_jax.training.run import microbatches, train, training_steps
from tsalign_jax.types import Branches

WIDTH_MULTIPLE = 16  # tokens; all microbatches of a stage share one shape, so that it compiles once
# Nats a token by which the two programs that compute log-probabilities may round differently. On CPU they do not.
DRIFT_PER_TOKEN = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class PairBatches:
  """The pairs of a round as device batches of one shape."""

  rows: Rows
  prompt: int
  response: int

  @classmethod
  def of(cls, rows: Rows) -> "PairBatches":
    """With widths that hold every pair."""
    prompt = max(len(row["prompt_tokens"]) for row in rows)
    response = max(len(row[side]) for row in rows for side in ("chosen_tokens", "rejected_tokens"))
    return cls(rows, round_up(prompt, WIDTH_MULTIPLE), round_up(response, WIDTH_MULTIPLE))

  def mean_length(self) -> float:
    """Tokens a response."""
    return float(np.mean([len(row["chosen_tokens"]) + len(row["rejected_tokens"]) for row in self.rows])) / 2

  def take(self, indices) -> Branches:
    """These pairs, chosen first."""
    rows = [self.rows[index] for index in indices]
    branches = [[row["chosen_tokens"], row["rejected_tokens"]] for row in rows]
    return make_branches([row["prompt_tokens"] for row in rows], branches, self.prompt, self.response)


def align(job: Job) -> Counts:
  """Writes the next policy and the log of its training."""
  model, settings = job.policy(), job.config.align
  batches = PairBatches.of(read_table(job.reads["pairs"], used_only=True))
  pairs = len(batches.rows)
  microbatch = round_up(min(settings.microbatch, settings.batch_size), batch_ways(job.mesh))
  steps = training_steps(pairs, settings)
  with job.progress(steps, "steps") as advance:
    advance(0, "reference")
    reference = _reference_logps(job, model, batches, microbatch)
    skeleton, names, load, frozen = _trained_part(job, model)

    def make_microbatch(indices, weights) -> AlignBatch:
      return put_batch(AlignBatch(batches.take(indices), reference[list(indices)], weights), job.mesh)

    def on_step(step: int, metrics: dict[str, float]) -> None:
      if step == 0:
        _check_start(job, metrics["logps/drift"], model, batches)
      advance(1, f"loss {metrics['loss']:.3f} margin {metrics['rewards/margins']:+.3f}")

    abstract = skeleton.abstract(job.mesh, jnp.float32)
    trained = train(
      build_trainer(build_loss(model, job.mesh, settings), settings, steps, skeleton, job.mesh),
      settings,
      {name: abstract[name] for name in names},
      load,
      frozen,
      make_microbatch,
      pairs=pairs,
      seed=job.seed,
      folder=job.partial,
      microbatch=microbatch,
      on_step=on_step,
    )
  params = merge({**frozen, **trained}, settings.lora) if settings.lora else trained
  save_tree(job.writes["policy"], model.stored(params))
  shutil.copyfile(job.partial / "log.jsonl", job.writes["log"])
  return {"pairs": pairs, "steps": steps, "reference": settings.reference}


def _reference_logps(job: Job, model: ModelHandle, batches: PairBatches, microbatch: int) -> np.ndarray:
  """[pairs, 2], computed once; the reference leaves device memory before training begins."""
  job.partial.mkdir(parents=True, exist_ok=True)
  file = job.partial / "reference_logps.npy"
  if file.exists():
    return np.load(file)
  program, params = build_reference(model, job.mesh), job.load(model, job.reads["reference"])
  logps = []
  for indices, _ in microbatches(range(len(batches.rows)), microbatch):
    logps.append(np.asarray(program(params, put_batch(batches.take(indices), job.mesh))))
  out = np.concatenate(logps)[: len(batches.rows)]
  np.save(job.partial / "unfinished.npy", out)
  (job.partial / "unfinished.npy").replace(file)
  return out


def _trained_part(job: Job, model: ModelHandle):
  """(skeleton, names of what is trained, how to load that in float32, frozen rest): everything, or fresh adapters."""
  lora = job.config.align.lora
  if lora is None:
    return model.skeleton, list(model.skeleton.specs), lambda: wide(job.load(model, job.reads["policy"])), {}
  skeleton = adapted_skeleton(model, lora)
  names = [name for name in skeleton.specs if is_adapter(name)]

  def load():
    fresh, placed = skeleton.init(job.key, set(names)), skeleton.shardings(job.mesh)
    return {name: jax.device_put(fresh[name], placed[name]) for name in names}

  return skeleton, names, load, job.load(model, job.reads["policy"])


def _check_start(job: Job, drift: float, model: ModelHandle, batches: PairBatches) -> None:
  """Before the first update the policy is its own reference, so every margin is 0 up to rounding."""
  if job.reads["policy"] != job.reads["reference"]:
    return
  per_token = drift / batches.mean_length()
  if per_token > DRIFT_PER_TOKEN[model.dtype_name]:
    raise RuntimeError(f"{job.name}: log-probabilities are {per_token:.2g} nats a token from the reference's at step 0")

"""What a stage is: a function from files to files, called with a `Job` that holds everything it may use."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from tsalign_jax.config import Config, RewardConfig
from tsalign_jax.data.tables import Rows, read_table
from tsalign_jax.models.loading import ModelHandle, language_model, reward_model
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.seeding import derived_seed


class Progress(Protocol):
  """Shows how far a stage is: `with progress(total, unit) as advance: advance(n, note)`."""

  def __call__(self, total: int, unit: str) -> Any:
    """A context manager around a function (amount done, short note, whether an earlier attempt of the stage did it)."""
    ...


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of one stage. It reads `reads`, writes `writes`, and may keep what it needs to resume in `partial`."""

  name: str  # "round_01/sample"
  reads: Mapping[str, Path]
  writes: Mapping[str, Path]
  partial: Path
  options: Mapping[str, Any]
  config: Config | RewardConfig
  make_mesh: Callable[[], Mesh]  # called by the first stage that needs devices, and not before
  progress: Progress

  @property
  def mesh(self) -> Mesh:
    """The device mesh of the run."""
    return self.make_mesh()

  @property
  def sampling_mesh(self) -> Mesh:
    """The same devices as the policy samples on them."""
    return sampling_mesh(self.config, self.mesh)

  @property
  def seed(self) -> int:
    """A seed of this stage's own, from the configuration's seed and the stage's name."""
    return self.seed_of(self.name.rpartition("/")[2])

  def seed_of(self, stage: str) -> int:
    """The seed of a stage in the same folder, by its name there."""
    folder, slash, _ = self.name.rpartition("/")
    return derived_seed(self.config.seed, f"{folder}{slash}{stage}")

  @property
  def key(self) -> jax.Array:
    """The random key of this stage; items fold in their own index."""
    return jax.random.key(self.seed)

  def policy(self) -> ModelHandle:
    """The policy's handle."""
    return language_model(self.config.policy)

  def student(self) -> ModelHandle:
    """The student's handle."""
    return reward_model(self.config.student)

  def load(self, model: ModelHandle, source: Path, mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """A model's parameters from its Hugging Face folder or from a checkpoint of this run, on the run's mesh or this."""
    mesh = mesh or self.mesh
    if Path(source) == model.folder:
      return model.load(mesh, head_key=jax.random.key(self.config.seed))
    return model.restore(source, mesh)


def sampling_mesh(config: Config, mesh: Mesh) -> Mesh:
  """The mesh that the policy samples on: that of the run, unless the configuration names another."""
  return make_mesh(**config.sampling_mesh.model_dump()) if config.sampling_mesh else mesh


class Pace:
  """How fast a part of a stage is, in the process that ends it: compilation counts, what was done before does not."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock, self.done, self.seconds = clock, 0.0, 0.0

  @contextlib.contextmanager
  def of(self, amount: float) -> Iterator[None]:
    """Times the work in this context, which is so much."""
    started = self._clock()
    yield
    self.seconds += self._clock() - started
    self.done += amount

  @property
  def per_second(self) -> float | None:
    """The amount done in a second; None if nothing was."""
    return self.done / self.seconds if self.done and self.seconds else None


def in_words(dropped: Mapping[str, int]) -> str:
  """How many were dropped for which reason: "longer than 60 tokens: 3, the prompt is held out: 1"."""
  return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(dropped.items())) or "there was none"


Counts = dict[str, Any]  # what a stage reports: numbers for the manifest and the metrics
Stage = Callable[[Job], Counts]


def shards(job: Job, groups: int) -> Iterable[tuple[int, Path]]:
  """(index, file) of every part of this stage's output that does not exist yet."""
  job.partial.mkdir(parents=True, exist_ok=True)
  for index in range(groups):
    if not _shard(job, index).exists():
      yield index, _shard(job, index)


def gathered(job: Job) -> Rows:
  """The rows of all parts that there are, in the order of their names."""
  return [row for file in sorted(job.partial.glob("*.parquet")) for row in read_table(file)]


def new_shards(job: Job) -> Iterator[Path]:
  """The files of the parts to come, where parts are numbered as they come, without end."""
  job.partial.mkdir(parents=True, exist_ok=True)
  return (_shard(job, index) for index in itertools.count(len(list(job.partial.glob("*.parquet")))))


def _shard(job: Job, index: int) -> Path:
  return job.partial / f"{index:08d}.parquet"

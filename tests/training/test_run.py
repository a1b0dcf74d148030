"""When a training's steps, batches and metrics happen."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp

from tsalign_jax.config import Align
from tsalign_jax.training import run
from tsalign_jax.training.optimizer import State


def test_each_step_is_launched_before_the_metrics_of_the_last_one_are_waited_for(tmp_path, monkeypatch):
  """So the host lays out the next batches, and the device has work, while a step is being computed."""
  events = []

  def step(state, frozen, parts):
    events.append(f"step {len([event for event in events if event.startswith('step')])} of {next(parts)}")
    return state, [{"loss": len(events)}]

  def fetch(metrics):
    events.append("fetch")
    return {"loss": 1.0, "grad_norm": 1.0}

  monkeypatch.setattr(run, "fetch", fetch)
  params = {"w": jnp.zeros(2)}
  abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), params)
  trainer = types.SimpleNamespace(
    step=step,
    start=lambda trainable: State(trainable, params, params),
    abstract_state=lambda trainable: abstract,
    schedule=lambda step: 0.1,
  )
  booked = []
  run.train(
    trainer,
    Align(batch_size=2, checkpoint_every=4, epochs=1),
    abstract,
    lambda: params,
    {},
    lambda indices: iter([len(indices)]),
    section="align",
    pairs=11,
    seed=0,
    folder=Path(tmp_path),
    on_step=lambda number, metrics: booked.append(number),
    on_resume=None,
  )
  one_late = ["step 0 of 2", "step 1 of 2", "fetch", "step 2 of 2", "fetch", "step 3 of 2", "fetch", "fetch"]
  assert events == [*one_late, "step 4 of 2", "step 5 of 1", "fetch", "fetch"]  # a checkpoint waits for its own
  assert booked == list(range(6))

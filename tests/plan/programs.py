"""Compiles the programs of an 8B model for a TPU slice that is not there, and prints what is known about each as JSON.

Run in a process of its own, since libtpu wants its environment set before jax is imported:

    python programs.py TOPOLOGY FOLDER     (FOLDER holds config.json and a tokenizer)
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from traffic import Program

from tsalign_jax.config import Align, Sampling, Student
from tsalign_jax.data.packing import SMALLEST, Layout, pack
from tsalign_jax.models.config import read_config
from tsalign_jax.models.loading import ModelHandle
from tsalign_jax.parallel.mesh import batch_ways, replicated, sharding
from tsalign_jax.parallel.topology import topology_mesh
from tsalign_jax.sampling.cache import PHASE
from tsalign_jax.sampling.engine import build_sampler
from tsalign_jax.scoring.reward import build_reward_engine
from tsalign_jax.training.align import AlignBatch, build_loss
from tsalign_jax.training.optimizer import build_trainer
from tsalign_jax.types import Branches, Packed

# As `sampling_mesh` says in a configuration; everything else runs on the default mesh, over which weights are split.
SAMPLING_MESH = {"v5e:4x4": {"data": 2, "fsdp": 1, "tensor": 8}, "v5p:2x2x4": {"data": 16, "fsdp": 1}}
PROMPTS, PROMPT, RESPONSE = 16, 512, 512
ROWS = 16  # of a microbatch of pairs
LAYOUT = Layout(length=3072, targets=2048, usual_targets=2048, items=3072 // SMALLEST, k=2)
ONE_BLOCK = Layout(length=640, targets=480, usual_targets=480, items=640 // SMALLEST, k=2)  # the largest of the kernel
SAMPLING = Sampling(responses=8, max_new_tokens=RESPONSE, batch_prompts=PROMPTS)


def rows(mesh: Mesh, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
  """An array of a batch."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(("batch", *[None] * (len(shape) - 1)), shape, mesh))


def branches(mesh: Mesh, count: int, prompt: int, k: int, response: int) -> Branches:
  """A `Branches` batch of shapes."""
  return Branches(rows(mesh, count, prompt), rows(mesh, count, k, response), rows(mesh, count), rows(mesh, count, k))


def packed(mesh: Mesh, count: int, layout: Layout) -> Packed:
  """A `Packed` batch of shapes."""
  blank = pack([[]] * count, layout, batch_ways(mesh))
  return jax.tree.map(lambda array: rows(mesh, *array.shape), blank)


def on_device(tree) -> int:
  """Bytes that each device holds of these arrays."""
  shapes = jax.tree.leaves(tree)
  return sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in shapes)


def facts(lowered) -> tuple[dict, str]:
  """What is known about a program once it is compiled, and its text; raises where it does not fit."""
  compiled = lowered.compile()
  text = compiled.as_text()
  kernels = text.count('custom_call_target="tpu_custom_call"')
  return {"kernels": kernels, "peak": compiled.memory_analysis().peak_memory_in_bytes}, text


def sample(model: ModelHandle, mesh: Mesh) -> dict[str, dict]:
  """Prefill, and decode with what one step of it moves, the end of its phase included."""
  sampler = build_sampler(model, mesh, SAMPLING, (128001, 128009))
  params = model.skeleton.abstract(mesh, model.dtype)
  shapes, where = jax.eval_shape(lambda: sampler.empty(PROMPT)), sampler.empty.lower(PROMPT).compile().output_shardings
  slots = jax.tree.map(lambda one, to: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=to), shapes, where)
  everywhere = replicated(mesh)
  ids = jax.ShapeDtypeStruct((sampler.admitted,), jnp.int32, sharding=everywhere)
  flags = [jax.ShapeDtypeStruct((sampler.slots,), dtype, sharding=everywhere) for dtype in (jnp.int32, bool)]
  batch = branches(mesh, sampler.admitted, PROMPT, 0, 0)
  prefill, _ = facts(sampler.admit.lower(params, slots, batch, ids, flags[0]))
  key = jax.eval_shape(lambda: jax.random.key(0))
  decode, text = facts(sampler.decode.lower(params, slots, flags[1], 1, key))
  program = Program(text)
  moved = program.traffic(program.open_loop()) / PHASE
  return {"prefill": prefill, "decode": decode | {"moved": moved, "ideal": ideal_step(model, mesh, params)}}


def ideal_step(model: ModelHandle, mesh: Mesh, params) -> int:
  """Bytes of weights and caches on a device, each read once; of the embeddings a step reads a few rows."""
  config = model.config
  weights = on_device({name: array for name, array in params.items() if "embed_tokens" not in name})
  lanes = {"trunk": PROMPT, "own": SAMPLING.responses * RESPONSE}
  shapes = [(config.layers, PROMPTS, config.kv_heads, length, config.head_dim) for length in lanes.values()]
  axes = ("layers", "batch", "kv_heads", None, None)
  caches = [jax.ShapeDtypeStruct(shape, model.dtype, sharding=sharding(axes, shape, mesh)) for shape in shapes]
  return weights + 2 * on_device(caches)


def score(model: ModelHandle, mesh: Mesh) -> dict:
  """Scoring eight responses a prompt with a reward model of this size."""
  model = dataclasses.replace(model, config=dataclasses.replace(model.config, reward_head=True), remat=False)
  engine = build_reward_engine(model, mesh, Student(path=model.folder))
  params = model.skeleton.abstract(mesh, model.param_dtype)
  return facts(engine.program.lower(params, branches(mesh, PROMPTS, PROMPT, 8, RESPONSE)))[0]


def train(model: ModelHandle, mesh: Mesh, layout: Layout = LAYOUT) -> dict[str, dict]:
  """A DPO step: accumulating over microbatches, and the update."""
  trainer = build_trainer(build_loss(model, mesh, Align()), Align(), 100, model.skeleton, mesh)
  params = model.skeleton.abstract(mesh)
  shapes = (ROWS, layout.items, 2), (ROWS, layout.items)  # reference log-probabilities, weights
  batch = AlignBatch(packed(mesh, ROWS, layout), *(rows(mesh, *shape, dtype=jnp.float32) for shape in shapes))
  state = trainer.abstract_state(params)
  accumulate, _ = facts(trainer.accumulate.lower(params, True, params, {}, batch))
  update, _ = facts(trainer.update.lower(params, state, params))
  return {"accumulate": accumulate | {"beside": on_device(state)}, "update": update}


def small_gemma(model: ModelHandle) -> ModelHandle:
  """Few and small layers with all that is special about attention in Gemma 2."""
  sizes = {"vocab": 2048, "embed": 512, "mlp": 1024, "layers": 4, "heads": 16, "kv_heads": 16, "head_dim": 256}
  kinds = {"windows": (1024, None) * 2, "layer_ropes": (0,) * 4, "attention_softcap": 50.0, "gemma": True}
  return dataclasses.replace(model, config=dataclasses.replace(model.config, **sizes, **kinds))


def known_loops(device) -> dict[str, int]:
  """Traffic of one step of two loops of which it is known, with the cache updated in place and copied."""
  layers, width, lanes, length = 32, 1024, 16, 1024
  shapes = {"weights": (layers, width, width), "cache": (layers, lanes, length, width), "x": (lanes, width)}
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device)) for shape in shapes.values()
  ]

  def use(weights, entry, x):
    return jnp.tanh(x @ weights + entry.sum(axis=1))

  def in_place(weights, cache, x, step):
    def layer(carry, inputs):
      cache, x = carry
      index, weights = inputs
      cache = jax.lax.dynamic_update_slice(cache, x[None, :, None], (index, 0, step, 0))
      return (cache, use(weights, cache[index], x)), None

    return jax.lax.scan(layer, (cache, x), (jnp.arange(layers), weights))[0]

  def copied(weights, cache, x, step):
    def layer(x, inputs):
      weights, entry = inputs
      entry = jax.lax.dynamic_update_slice(entry, x[:, None], (0, step, 0))
      return use(weights, entry, x), entry

    x, cache = jax.lax.scan(layer, x, (weights, cache))
    return cache, x

  def moved(one_step):
    def loop(weights, cache, x):
      going = lambda state: (state[2] < length) & (state[1].max() > 0)  # noqa: E731
      step = lambda state: (*one_step(weights, state[0], state[1], state[2]), state[2] + 1)  # noqa: E731
      return jax.lax.while_loop(going, step, (cache, x, 0))

    program = Program(jax.jit(loop, donate_argnums=1).lower(*arrays).compile().as_text())
    return program.traffic(program.open_loop())

  return {"expected": on_device(arrays[:2]), "in_place": moved(in_place), "copied": moved(copied)}


def main(topology: str, folder: str) -> None:
  model = ModelHandle(Path(folder), read_config(Path(folder)), "stacked", True, "bfloat16", "bfloat16")
  mesh = topology_mesh(topology)
  programs = sample(model, topology_mesh(topology, **SAMPLING_MESH[topology])) | {"score": score(model, mesh)}
  gemma = {name: train(small_gemma(model), mesh, layout) for name, layout in (("gemma", LAYOUT), ("short", ONE_BLOCK))}
  programs |= train(model, mesh) | {name: each["accumulate"] for name, each in gemma.items()}
  print(json.dumps({"programs": programs, "loops": known_loops(mesh.devices.flat[0])}))


if __name__ == "__main__":
  main(*sys.argv[1:])

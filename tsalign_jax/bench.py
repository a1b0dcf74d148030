"""How fast this machine runs a configuration's engines, and how near that is to what the machine can do.

Speeds are of useful work only: padding, empty slots and recomputation are not counted, so all of them show as a
smaller share of the machine's own best. Programs are compiled before they are timed.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich import box
from rich.table import Table

from tsalign_jax.config import Config, LoRA
from tsalign_jax.data.chat import Chat
from tsalign_jax.data.files import read_prompts
from tsalign_jax.data.packing import Item, Packing
from tsalign_jax.loop import check_inputs
from tsalign_jax.models.config import DecoderConfig, EncoderConfig, ModelConfig
from tsalign_jax.models.functional import Params
from tsalign_jax.models.loading import ModelHandle, language_model, reward_model
from tsalign_jax.models.lora import TrainedPart, trained_part
from tsalign_jax.ops.einsum import wide_matmul
from tsalign_jax.parallel.mesh import batch_ways, make_mesh
from tsalign_jax.sampling.engine import build_sampler
from tsalign_jax.scoring.reward import Encoded, build_reward_engine
from tsalign_jax.stages.base import sampling_mesh
from tsalign_jax.training import align, reward
from tsalign_jax.training.optimizer import Trainer, build_trainer
from tsalign_jax.training.run import in_order
from tsalign_jax.types import Conversation, PreferencePair, UserError

MATRIX = {"cpu": 2048, "default": 8192}  # rows and columns of the product that measures the peak
REPEATS = 4
COPIED = {"cpu": 1 << 26, "default": 1 << 28}  # numbers of the array that measures the bandwidth, on each device


@dataclasses.dataclass(frozen=True)
class Machine:
  """What all devices of a mesh do together, measured: operations a second in matrix products, and bytes a second."""

  devices: str
  flops: dict[str, float]  # by the dtype of the matrices
  bandwidth: float


@dataclasses.dataclass(frozen=True)
class Phase:
  """One engine's work, in its unit, tokens, floating-point operations, and bytes that have to move; and its time."""

  name: str
  dtype: str
  unit: str
  count: int
  tokens: int
  flops: float
  moved: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Sampled:
  """Prompts with their responses, as messages and text and as the policy's tokens."""

  prompts: list[Conversation]
  texts: list[list[str]]
  items: list[Item]


def bench(config: Config, prompts: int, runs: int) -> Iterator[Machine | Phase]:
  """The machine, then each phase as it has been timed: the median of `runs`, on the first training prompts.

  Raises UserError for what a run would refuse as well.
  """
  check_inputs(config)
  mesh = make_mesh(**config.mesh.model_dump())
  conversations = [prompt.messages for prompt in read_prompts(config.prompts.train)]
  policy, student = language_model(config.policy), reward_model(config.student)
  chat = Chat.load(config.policy.path)
  tokenised = ((messages, chat.prompt_tokens(messages)) for messages in conversations)
  usable = ((messages, tokens) for messages, tokens in tokenised if len(tokens) <= config.prompts.max_tokens)
  chosen = list(itertools.islice(usable, prompts))
  if not chosen:
    raise UserError(f"{config.prompts.train}: every prompt is longer than prompts.max_tokens")
  yield measure(mesh, {policy.dtype_name, student.dtype_name})
  sampled_on = sampling_mesh(config, mesh)
  params = policy.for_inference.load(sampled_on)
  sampled, phase = _sample(config, policy, sampled_on, params, chat, chosen, runs)
  yield phase
  del params  # before there is another copy
  params = policy.load(mesh)
  yield from _align(config, policy, mesh, params, sampled, runs)
  del params
  yield from _student(config, student, mesh, sampled, runs)


def measure(mesh: Mesh, dtypes: Collection[str]) -> Machine:
  """The best of a large matrix product in each of the dtypes, and of adding to a large array in place."""
  device = mesh.devices.flat[0]
  size = MATRIX.get(device.platform, MATRIX["default"])
  length = COPIED.get(device.platform, COPIED["default"])
  ways = mesh.devices.size

  def on_each(*shape: int, dtype):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    return jax.jit(lambda: jnp.ones((ways, *shape), dtype), out_shardings=where)()

  multiply, add = jax.jit(wide_matmul), jax.jit(lambda numbers: numbers + 1, donate_argnums=0)
  numbers = [on_each(length, dtype=jnp.float32)]

  def add_often():
    for _ in range(REPEATS):
      numbers[0] = add(numbers[0])
    return numbers[0]

  def best(often: Callable[[], Any]) -> float:
    return _timed(often, 5, min)[1] / REPEATS

  flops = {}
  for dtype in sorted(dtypes):
    matrix = on_each(size, size, dtype=dtype)
    seconds = best(lambda matrix=matrix: [multiply(matrix, matrix) for _ in range(REPEATS)])
    flops[dtype] = ways * 2 * size**3 / seconds
  kind = f"{ways} x {device.device_kind}" if ways > 1 else device.device_kind
  return Machine(kind, flops, ways * 2 * length * 4 / best(add_often))


def table(machine: Machine, phases: Sequence[Phase]) -> Table:
  """Phases with their speed, and the share of the machine's best that it is."""
  out = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption=_legend(machine))
  for heading in ("", "work", "seconds", "speed", "tokens/s", "TFLOP/s\n(of peak)", "GB/s\n(of peak)"):
    out.add_column(heading, justify="right" if heading else "left", no_wrap=True)
  for phase in phases:
    speed, tokens = phase.count / phase.seconds, phase.tokens / phase.seconds
    work = [f"{phase.count:,} {phase.unit}", f"{phase.seconds:.2f}", f"{speed:,.{0 if speed >= 100 else 1}f}/s"]
    flops, moved = phase.flops / phase.seconds, phase.moved / phase.seconds
    shares = _of(flops, machine.flops[phase.dtype], 1e12), _of(moved, machine.bandwidth, 1e9)
    out.add_row(phase.name, *work, f"{tokens:,.0f}", *shares)
  return out


def _of(rate: float, best: float, unit: float) -> str:
  return f"{rate / unit:.3g} ({rate / best:.0%})"


def _legend(machine: Machine) -> str:
  products = " and ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in machine.flops.items())
  return (
    f"{machine.devices}: {products} in a large matrix product, "
    f"{machine.bandwidth / 1e9:.3g} GB/s to and from memory, both measured here. Tokens are sampled ones, elsewhere "
    "those of prompts and responses. Bytes are those that have to move: weights for each batch on each replica, in "
    "sampling for each step with the keys and values that are seen, in training gradients and the optimizer's state as "
    "well."
  )


def _sample(config: Config, model: ModelHandle, mesh: Mesh, params: Params, chat: Chat, prompts, runs: int):
  """What was sampled, and how fast."""
  sampler = build_sampler(model, mesh, config.sampling, chat.stop_tokens)
  tokens = [tokens for _, tokens in prompts]

  def sample():
    harvests = sampler.run(params, list(enumerate(tokens)), jax.random.key(config.seed))
    return dict(answer for harvest in harvests for answer in harvest)

  answers, seconds = _timed(sample, runs)
  items = [Item(row, [list(answer.tokens) for answer in answers[index]]) for index, row in enumerate(tokens)]
  texts = [[chat.text(tokens) for tokens in item.responses] for item in items]
  new = sum(item.targets for item in items)
  flops, moved = _flops(model, items), _decoded_bytes(model, items, sampler.slots * sampler.lanes, batch_ways(mesh))
  phase = Phase("sample", model.dtype_name, "tokens", new, new, flops, moved, seconds)
  return Sampled([messages for messages, _ in prompts], texts, items), phase


def _align(
  config: Config, model: ModelHandle, mesh: Mesh, params: Params, sampled: Sampled, runs: int
) -> Iterator[Phase]:
  """Reference log-probabilities and DPO steps over the first two responses to each prompt."""
  settings = config.align
  pairs = [Item(item.prompt, item.responses[:2]) for item in sampled.items]
  packing = Packing(pairs, min(settings.batch_size, len(pairs)), settings.microbatch_tokens, batch_ways(mesh))
  steps = in_order(len(pairs), settings.batch_size)
  program = align.build_reference(model, mesh)

  def known() -> np.ndarray:
    return align.known_logps(program, params, packing, steps, mesh)

  logps, seconds = _timed(known, runs)
  batches = sum(1 for step in steps for _ in packing.batches(step))
  work = (model.dtype_name, "pairs", len(pairs), _tokens(pairs))
  moved = batches * batch_ways(mesh) * _read(model, params)
  yield Phase("reference", *work, _flops(model, pairs), moved, seconds)

  part = trained_part(model, settings.lora, lambda: params, jax.random.key(0), mesh)
  trainer = build_trainer(align.build_loss(model, mesh, settings), settings, len(steps), part.skeleton, mesh)

  def microbatches(step: Sequence[int]):
    return align.make_batches(packing, step, logps, mesh)

  seconds, moved = _epoch(model, mesh, part, trainer, steps, microbatches, runs)
  yield Phase("align", *work, _backward(settings.lora) * _flops(model, pairs), moved, seconds)


def _student(config: Config, model: ModelHandle, mesh: Mesh, sampled: Sampled, runs: int) -> Iterator[Phase]:
  """Scoring of all responses, and steps over the first two to each prompt."""
  engine, settings = build_reward_engine(model, mesh, config.student), config.distil
  params = model.load(mesh, head_key=jax.random.key(config.seed))
  items = [engine.encode(*each) for each in zip(sampled.prompts, sampled.texts, strict=True)]
  _, seconds = _timed(lambda: list(engine.score(params, items)), runs)
  responses, alike = sum(len(item.responses) for item in items), _as_items(items)
  moved = engine.count_batches(items) * batch_ways(mesh) * _read(model, params)
  kind = model.dtype_name
  yield Phase("score", kind, "responses", responses, _tokens(alike), _flops(model, alike), moved, seconds)
  if settings is None:
    return

  answered = zip(sampled.prompts, sampled.texts, strict=True)
  pairs = [reward.make_example(engine, PreferencePair(prompt, *texts[:2])) for prompt, texts in answered]
  steps, laid_out = in_order(len(pairs), settings.batch_size), reward.Examples(engine, pairs, settings)
  part = trained_part(model, settings.lora, lambda: params, jax.random.key(0), mesh)
  trainer = build_trainer(reward.build_loss(engine, settings), settings, len(steps), part.skeleton, mesh)
  seconds, moved = _epoch(model, mesh, part, trainer, steps, laid_out.parts, runs)
  alike = _as_items([pair.item for pair in pairs])
  flops = _backward(settings.lora) * _flops(model, alike)
  yield Phase("distil", kind, "pairs", len(pairs), _tokens(alike), flops, moved, seconds)


def _backward(lora: LoRA | None) -> int:
  """Operations of a training step, as a multiple of the forward pass: no gradient is computed of frozen weights."""
  return 2 if lora else 3


def _epoch(
  model: ModelHandle,
  mesh: Mesh,
  part: TrainedPart,
  trainer: Trainer,
  steps: Sequence[Sequence[int]],
  microbatches: Callable[[Sequence[int]], Iterable[Any]],
  runs: int,
) -> tuple[float, float]:
  """Seconds of one pass over all steps, and the bytes that it has to move."""
  state = trainer.start(part.load())
  batches = sum(1 for step in steps for _ in microbatches(step))
  moved = _trained_bytes(model, part, state.trainable, batches, len(steps), batch_ways(mesh))

  def epoch():
    nonlocal state
    for step in steps:
      state, metrics = trainer.step(state, part.frozen, microbatches(step))
    return metrics

  return _timed(epoch, runs)[1], moved


def _trained_bytes(
  model: ModelHandle, part: TrainedPart, trainable: Params, batches: int, steps: int, ways: int
) -> float:
  """Bytes that training has to move: weights forth and back, gradients added to for each batch, AdamW for each step.

  The update reads gradients, weights and two moments, and writes all but the first. Each of the `ways` in which a batch
  is split reads all weights, but updates what its devices hold.
  """
  read = _read(model, part.frozen) + _size(trainable)
  return batches * 2 * (ways * read + _held(trainable)) + steps * 7 * _held(trainable)


def _read(model: ModelHandle, params: Params) -> int:
  """Bytes that a forward pass reads: tables of embeddings only where they are the vocabulary projection as well."""
  projected = isinstance(model.config, DecoderConfig) and model.config.tied and not model.config.reward_head
  return _size({name: array for name, array in params.items() if projected or not name.endswith(".embedding")})


def _size(params: Params) -> int:
  return sum(array.nbytes for array in params.values())


def _held(params: Params) -> int:
  """Bytes on all devices together: what several of them hold is counted for each."""
  return sum(shard.data.nbytes for array in params.values() for shard in array.addressable_shards)


def _tokens(items: Sequence[Item]) -> int:
  return sum(item.tokens for item in items)


def _as_items(items: Sequence[Encoded]) -> list[Item]:
  return [Item(item.prompt, item.responses) for item in items]


def _timed(call: Callable[[], Any], runs: int, of: Callable[[list[float]], float] = median) -> tuple[Any, float]:
  """The result of the first call, which compiles, and the seconds of one: the median of some more, or `of` them."""
  result, out = jax.block_until_ready(call()), []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(call())
    out.append(time.perf_counter() - start)
  return result, of(out)


def _flops(model: ModelHandle, items: Sequence[Item]) -> float:
  """Operations that a forward pass needs: two for each weight and token, and what attention adds (PaLM, appendix B).

  Each prompt counts once and sees itself; each response sees its prompt and itself. Only response tokens pay the
  vocabulary projection. Where a reward is read at the first token, the last layer asks for that one alone.
  """
  config, weights = model.config, _weights(model)
  heads = config.heads * config.head_dim if isinstance(config, DecoderConfig) else config.embed
  *windows, last = config.windows
  whole = Counter(windows if _first_only(config) else config.windows)
  total = 0.0
  for item in items:
    seen = sum(count * _seen(config, item, window) for window, count in whole.items())
    if _first_only(config):
      rows = (len(item.prompt) + len(row) for row in item.responses)
      seen += sum(row if last is None else min(row, last + 1) for row in rows)
    total += 2 * (weights.tokens * item.tokens + weights.responses * len(item.responses)) + 4 * heads * seen
    if isinstance(config, DecoderConfig) and not config.reward_head:
      total += 2 * config.vocab * config.embed * item.targets
  return total


def _seen(config: ModelConfig, item: Item, window: int | None) -> float:
  """Keys that the tokens of an item see, all together, in a layer with this window."""
  prompt, lengths = len(item.prompt), [len(row) for row in item.responses]

  def both_sides(row: int) -> float:
    reach = row if window is None else min(row, window)
    return row * (2 * reach + 1) - reach * (reach + 1)

  def before(position: int) -> float:
    reach = position if window is None else min(position, window)
    return reach * (reach + 1) / 2 + (position - reach) * reach

  if not isinstance(config, DecoderConfig):  # each response in a row of its own, with its prompt
    return sum(both_sides(prompt + length) for length in lengths)
  return before(prompt) + sum(before(prompt + length) - before(prompt) for length in lengths)


class Weights(NamedTuple):
  """Weights of matrix products, without the vocabulary projection, by how often they are multiplied with."""

  tokens: int
  """For each token."""
  responses: int
  """Once for each response: the reward head, and what the last layer computes of the first token only."""


def _first_only(config: ModelConfig) -> bool:
  return isinstance(config, EncoderConfig) and config.pooling == "cls"


def _weights(model: ModelHandle) -> Weights:
  specs = {name: spec for name, spec in model.skeleton.specs.items() if spec.inputs and "lm_head" not in name}
  last = f"model.layers.{model.config.layers - 1}."

  def once(name: str) -> bool:
    asked_of_all = name.endswith(("key.kernel", "value.kernel", "attn_qkv.kernel"))
    return not name.startswith("model.") or (_first_only(model.config) and name.startswith(last) and not asked_of_all)

  sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
  rare = sum(size for name, size in sizes.items() if once(name))
  return Weights(sum(sizes.values()) - rare, rare)


def _decoded_bytes(model: ModelHandle, items: Sequence[Item], lanes: int, ways: int) -> float:
  """Bytes that decoding has to read: all weights at each step of full lanes, and the keys and values of what is seen.

  A prompt's own are read once for all of its responses that grow together; weights, in each of the `ways` in which
  slots are split.
  """
  config, width = model.config, model.dtype.itemsize
  weights = (_weights(model).tokens + config.vocab * config.embed) * width
  steps = sum(item.targets for item in items) / min(lanes, sum(len(item.responses) for item in items))
  of_token = 2 * config.kv_heads * config.head_dim * width
  layers = Counter(config.windows).items()
  read = sum(count * _keys_read(item, window) for item in items for window, count in layers)
  return steps * weights * ways + read * of_token


def _keys_read(item: Item, window: int | None) -> float:
  """Keys that a layer with this window reads while the responses grow together."""
  longest = max(map(len, item.responses))
  prompt = len(item.prompt) * longest
  if window is not None:
    prompt = np.clip(window - 1 - np.arange(longest), 0, len(item.prompt)).sum()
  reaches = [(len(row), len(row) if window is None else min(len(row), window)) for row in item.responses]
  return prompt + sum(reach**2 / 2 + (row - reach) * reach for row, reach in reaches)

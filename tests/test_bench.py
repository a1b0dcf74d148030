"""`tsalign bench`: every phase is timed, and work is counted as it is."""

import dataclasses
from io import StringIO

import jax
import pytest
import tiny
from ragged import packed_rows
from rich.console import Console

from tsalign_jax import bench
from tsalign_jax.config import LoRA, Policy, Student, load_config
from tsalign_jax.data.packing import Item
from tsalign_jax.data.texts import Text, make_texts
from tsalign_jax.models.config import read_config
from tsalign_jax.models.loading import language_model, reward_model
from tsalign_jax.models.lora import trained_part
from tsalign_jax.parallel.mesh import make_mesh
from tsalign_jax.training.align import build_reference
from tsalign_jax.types import UserError


@pytest.mark.parametrize(
  "overrides", [[], ["mesh.fsdp=8", "sampling_mesh={data: 4, fsdp: 1, tensor: 2}", "align.lora.rank=2"]]
)
def test_every_phase_has_a_speed_and_nothing_is_written(overrides, tmp_path, monkeypatch):
  monkeypatch.setitem(bench.MATRIX, "cpu", 256)
  monkeypatch.setitem(bench.COPIED, "cpu", 1 << 18)
  config = load_config(tiny.run_config(tmp_path), [*overrides, "student.dtype=bfloat16"])
  machine, *phases = bench.bench(config, prompts=3, runs=1)
  assert list(machine.flops) == ["bfloat16", "float32"] and min(machine.flops.values()) > 1e8
  assert machine.bandwidth > 1e8
  dtypes = {phase.name: phase.dtype for phase in phases}
  assert {name for name, dtype in dtypes.items() if dtype == "bfloat16"} == {"score", "distil"}
  counts = {phase.name: (phase.count, phase.unit) for phase in phases}
  k = config.sampling.responses
  assert list(counts) == ["sample", "reference", "align", "score", "distil"]
  assert counts["score"] == (3 * k, "responses") and counts["align"] == counts["distil"] == (3, "pairs")
  assert 3 * k <= counts["sample"][0] <= 3 * k * config.sampling.max_new_tokens
  assert all(phase.seconds > 0 and phase.flops > 0 and phase.moved > 0 for phase in phases)
  tokens = {phase.name: phase.tokens for phase in phases}
  assert tokens["sample"] == counts["sample"][0] and tokens["reference"] == tokens["align"] < tokens["score"]
  assert not config.run.exists()


def test_what_a_run_would_refuse_is_refused_before_anything_is_measured(tmp_path):
  config = load_config(tiny.run_config(tmp_path), ["sampling.max_new_tokens=100"])
  with pytest.raises(UserError, match=r"prompts.max_tokens \+ sampling.max_new_tokens = 160, but .*128 tokens"):
    next(bench.bench(config, prompts=3, runs=1))


def test_shares_are_of_what_the_machine_can_do():
  machine = bench.Machine("a cpu", flops={"bfloat16": 2e12, "float32": 1e12}, bandwidth=1e10)
  phases = [bench.Phase("align", "bfloat16", "pairs", 30, 6000, flops=3e12, moved=5e9, seconds=2.0)]
  console = Console(width=120, file=StringIO(), color_system=None)
  console.print(bench.table(machine, phases))
  row = next(line.split() for line in console.file.getvalue().splitlines() if "align" in line)
  assert row == ["align", "30", "pairs", "2.00", "15.0/s", "3,000", "1.5", "(75%)", "2.5", "(25%)"]


def test_training_moves_weights_for_each_batch_and_the_optimizer_for_each_step(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32"))
  params = model.load(one_device)
  size = 4 * sum(array.size for array in params.values())
  table = 4 * params["model.embed_tokens.embedding"].size  # of which a step reads a few rows, where it is frozen
  for lora in (None, LoRA(rank=2)):
    part = trained_part(model, lora, lambda: params, jax.random.key(0), one_device)
    trained = 4 * sum(array.size for array in part.load().values())
    assert (trained < size / 4) if lora else (trained == size)
    frozen = size - table if lora else 0
    assert bench._trained_bytes(model, part, part.load(), 5, 2, 1) == 5 * (2 * frozen + 4 * trained) + 2 * 7 * trained


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_each_device_reads_all_weights_but_updates_what_it_holds(axis, tmp_path):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32"))
  mesh = make_mesh(**{"data": 1, "fsdp": 1, axis: 8})
  params = model.load(mesh)
  part = trained_part(model, None, lambda: params, jax.random.key(0), mesh)
  size = 4 * sum(array.size for array in params.values())
  held = size * 8
  if axis == "fsdp":  # but for the norms, which are not split
    held = sum(array.nbytes * (1 if "fsdp" in array.sharding.spec else 8) for array in params.values())
    assert size < held < 2 * size
  assert bench._trained_bytes(model, part, params, 5, 2, 8) == 5 * 2 * (8 * size + held) + 2 * 7 * held


def test_operations_are_those_of_the_compiled_forward_pass(tmp_path, one_device):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="float32", layout="unrolled"))
  item = Item([5] * 128, ([6] * 96, [7] * 32))  # fills a row of 256 tokens
  batch, _ = packed_rows([item])
  params = model.load(one_device)
  counted = build_reference(model, one_device).lower(params, batch).compile().cost_analysis()["flops"]
  # XLA counts element by element work as well, and attention over the whole row.
  assert 0.5 < bench._flops(model, [item]) / counted < 1


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_operations_that_a_last_layer_spares_are_those_of_the_compiled_programs(family, tmp_path, one_device):
  """For the first token alone it is computed where the reward is read there."""
  tiny.encoder(family, tmp_path)
  model = reward_model(Student(path=tmp_path, dtype="float32"))
  params, rows, length = model.load(one_device, head_key=jax.random.key(0)), 4, 96
  texts = make_texts([[Text([5] * length, [0] * length)]] * rows, [[(row, 0)] for row in range(rows)], length, 1, rows)

  def counted(*, first_only: bool) -> float:
    program = jax.jit(lambda params: model.skeleton.bind(params).model(texts, first_only=first_only))
    return program.lower(params).compile().cost_analysis()["flops"]

  def ours(pooling: str) -> float:
    config = dataclasses.replace(model.config, pooling=pooling, windows=(None,) * model.config.layers)
    items = [Item([], [[5] * length])] * rows
    return bench._flops(dataclasses.replace(model, config=config), items)

  assert 0.7 < (ours("mean") - ours("cls")) / (counted(first_only=False) - counted(first_only=True)) < 1


def test_keys_beyond_a_window_are_not_counted(tmp_path):
  """Against a count of every pair of query and key."""
  item = Item([5] * 10, ([6] * 8, [7] * 4))
  for family, sides in (("gemma2", False), ("modernbert", True)):
    tiny.encoder(family, tmp_path / family) if sides else tiny.decoder(family, tmp_path / family)
    config = read_config(tmp_path / family)
    assert len(set(config.windows)) == 2
    for window in set(config.windows):
      reach = 99 if window is None else window if sides else window - 1
      counted = sum(
        (key > query and not sides) + (abs(key - query) > reach) == 0
        for row, first in (((18, 0), (14, 0)) if sides else ((10, 0), (18, 10), (14, 10)))
        for query in range(first, row)
        for key in range(row)
      )
      assert bench._seen(config, item, window) == counted


def test_decoding_reads_weights_at_each_step_and_keys_once(tmp_path):
  tiny.decoder("llama", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16"))
  item = Item([5] * 10, ([6] * 8, [7] * 4))
  weights = 2 * (bench._weights(model).tokens + model.config.vocab * model.config.embed)
  keys = 2 * 2 * model.config.layers * model.config.kv_heads * model.config.head_dim
  assert bench._decoded_bytes(model, [item], 2, 3) == 6 * 3 * weights + (10 * 8 + 8**2 / 2 + 4**2 / 2) * keys


def test_decoding_reads_no_keys_before_a_window(tmp_path):
  """Against a count of the keys that any of the responses sees, step by step."""
  tiny.decoder("gemma2", tmp_path)
  model = language_model(Policy(path=tmp_path, dtype="bfloat16"))
  (window,) = set(model.config.windows) - {None}
  item = Item([5] * 10, ([6] * 8, [7] * 4))
  prompt = sum(key > 10 + step - window for step in range(8) for key in range(10))
  assert prompt < 80
  own = sum(len(row) ** 2 / 2 - max(0, len(row) - window) ** 2 / 2 for row in item.responses)
  assert bench._keys_read(item, window) == prompt + own
  everything = bench._keys_read(item, None)
  assert everything == 10 * 8 + 8**2 / 2 + 4**2 / 2
  of_token = 2 * 2 * model.config.kv_heads * model.config.head_dim
  weights = 2 * (bench._weights(model).tokens + model.config.vocab * model.config.embed)
  half = model.config.layers // 2
  read = half * of_token * (everything + bench._keys_read(item, window))
  assert bench._decoded_bytes(model, [item], 2, 1) == 6 * weights + read


def test_weights_are_the_matrices_without_the_vocabulary(tmp_path, one_device):
  tiny.decoder("mistral", tmp_path)
  model = language_model(Policy(path=tmp_path))
  params = model.load(one_device).items()
  matrices = [array for name, array in params if name.endswith("kernel") and "lm_head" not in name]
  assert bench._weights(model) == (sum(array.size for array in matrices), 0)

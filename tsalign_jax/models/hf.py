"""Hugging Face folders in and out: safetensors, streamed one tensor at a time."""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from tsalign_jax.data.chat import TURNS, Chat
from tsalign_jax.models.config import DECODERS, ENCODERS, DecoderConfig, ModelConfig
from tsalign_jax.models.functional import Params, ParamSpec, Skeleton
from tsalign_jax.models.shards import write_shards
from tsalign_jax.types import UserError

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "tokenizer.model",
  "vocab.json",
  "vocab.txt",
  "merges.txt",
  "generation_config.json",
)
# Where a path differs from the Hugging Face name by more than its last part.
_BERT_LAYER = [
  (r"^model\.layers\.(\d+)\.", r"model.encoder.layer.\1."),
  (r"^model\.embeddings\.norm\.", "model.embeddings.LayerNorm."),
  (r"\.(query|key|value)\.", r".attention.self.\1."),
  (r"\.attention_output\.", ".attention.output.dense."),
  (r"\.attention_norm\.", ".attention.output.LayerNorm."),
  (r"\.up\.", ".intermediate.dense."),
  (r"\.down\.", ".output.dense."),
  (r"\.output_norm\.", ".output.LayerNorm."),
]
_RENAMES: Mapping[str, list[tuple[str, str]]] = {
  "bert": [
    *_BERT_LAYER,
    (r"^model\.", "bert."),
    (r"^dense\.", "bert.pooler.dense."),
    (r"^out\.", "classifier."),
  ],
  "roberta": [
    *_BERT_LAYER,
    (r"^model\.", "roberta."),
    (r"^dense\.", "classifier.dense."),
    (r"^out\.", "classifier.out_proj."),
  ],
  "modernbert": [
    (r"\.word_embeddings\.", ".tok_embeddings."),
    (r"\.attn_qkv\.", ".attn.Wqkv."),
    (r"\.attn_out\.", ".attn.Wo."),
    (r"\.mlp_in\.", ".mlp.Wi."),
    (r"\.mlp_out\.", ".mlp.Wo."),
    (r"^(dense|norm)\.", r"head.\1."),
    (r"^out\.", "classifier."),
  ],
}


class WeightFiles:
  """The tensors of a Hugging Face folder by name, whether in one safetensors file or in indexed shards."""

  def __init__(self, folder: Path):
    self.folder = Path(folder)
    index = self.folder / "model.safetensors.index.json"
    single = self.folder / "model.safetensors"
    if index.is_file():
      files = set(json.loads(index.read_text())["weight_map"].values())
    elif single.is_file():
      files = {single.name}
    else:
      raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    self._open = {}
    for file in sorted(files):
      try:
        handle = safe_open(self.folder / file, framework="numpy")
      except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{self.folder / file}: cannot be read as safetensors ({error})") from error
      self._open |= dict.fromkeys(handle.keys(), handle)

  def __contains__(self, name: str) -> bool:
    return name in self._open

  def find(self, name: str) -> str | None:
    """The name under which this tensor is stored.

    As it is; without its prefix, as a bare backbone is saved; with gamma and beta, as norms were called once.
    """
    bare = re.sub(r"^(model|bert|roberta)\.", "", name)
    names = [name, bare]
    names += [re.sub(r"(LayerNorm)\.weight$", r"\1.gamma", re.sub(r"(LayerNorm)\.bias$", r"\1.beta", n)) for n in names]
    return next((candidate for candidate in names if candidate in self._open), None)

  def slice(self, name: str):
    """A lazy view of one tensor."""
    return self._open[name].get_slice(name)


def hf_name(path: str, config: ModelConfig) -> str:
  """The Hugging Face name of a parameter path, for one layer: "model.norm.scale" -> "model.norm.weight"."""
  for pattern, replacement in _RENAMES.get(config.family, []):
    path = re.sub(pattern, replacement, path)
  return re.sub(r"\.(kernel|scale|embedding)$", ".weight", path)


def layer_paths(path: str, spec: ParamSpec) -> list[str]:
  """The path of each layer's own parameter, where layers are stacked; else the path itself."""
  if not spec.stacked:
    return [path]
  return [path.replace(".layers.", f".layers.{index}.") for index in range(spec.shape[0])]


def load_params(
  folder: Path, skeleton: Skeleton, config: ModelConfig, mesh: Mesh, *, dtype=jnp.float32, fresh_key=None
) -> tuple[dict[str, jax.Array], list[str]]:
  """The parameters of a Hugging Face folder on the mesh, and the names of those that were freshly initialised.

  Only parameters of the head may be missing, and only when `fresh_key` is given to initialise them.
  Raises UserError for a missing or misshapen tensor.
  """
  files = WeightFiles(folder)
  shardings = skeleton.shardings(mesh)
  params, missing = {}, []
  for path, spec in skeleton.specs.items():
    names = [files.find(hf_name(layer, config)) for layer in layer_paths(path, spec)]
    if None in names:
      missing.append(path)
      continue
    read = _reader(files, names, spec, dtype)
    params[path] = jax.make_array_from_callback(spec.shape, shardings[path], read)
  if missing and (fresh_key is None or any(path.startswith("model.") for path in missing)):
    wanted = ", ".join(hf_name(layer_paths(path, skeleton.specs[path])[0], config) for path in missing[:3])
    raise UserError(f"{folder}: its safetensors lack {len(missing)} tensor(s) of the model, such as {wanted}")
  if missing:
    fresh = skeleton.init(fresh_key, set(missing))
    params |= {path: jax.device_put(fresh[path].astype(dtype), shardings[path]) for path in missing}
  return params, missing


def _reader(files: WeightFiles, names: list[str], spec: ParamSpec, dtype):
  """Reads one device's part of a parameter: the callback of `make_array_from_callback`."""
  shape = spec.shape[1:] if spec.stacked else spec.shape

  def whole(name: str) -> np.ndarray:
    stored, wanted = tuple(files.slice(name).get_shape()), _hf_shape(name, shape, spec.inputs)
    if stored != wanted:
      raise UserError(f"{files.folder}: {name} has shape {stored}, its config.json asks for {wanted}")
    array = files.slice(name)[:]
    array = array.T if spec.inputs is not None else array
    return np.asarray(array.reshape(shape), dtype)

  def read(index):
    if not spec.stacked:
      return whole(names[0])[index]
    return np.stack([whole(name)[index[1:]] for name in names[index[0]]])

  return read


def _hf_shape(name: str, shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
  if inputs is not None:
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])
  return (math.prod(shape),) if name.endswith((".bias", ".beta")) else shape


def save_params(
  params: Params,
  skeleton: Skeleton,
  config: ModelConfig,
  source: Path,
  target: Path,
  *,
  dtype,
  chat_template: Path | None = None,
):
  """Writes a Hugging Face folder that transformers loads; config and tokenizer are copied from `source`.

  A `chat_template` takes the place of the one there.
  """
  target = Path(target)
  target.mkdir(parents=True, exist_ok=True)
  for file in ("config.json", *TOKENIZER_FILES):
    if (Path(source) / file).is_file():
      shutil.copyfile(Path(source) / file, target / file)
  if chat_template:
    shutil.copyfile(chat_template, target / "chat_template.jinja")
  _write_config(target / "config.json", config, dtype)
  if isinstance(config, DecoderConfig) and config.reward_head:
    _write_padding(target)
  write_shards(target, dict(hf_tensors(params, skeleton, config, dtype)))


class _Tensor(NamedTuple):
  """A tensor as Hugging Face shapes it, brought to the host only when read."""

  source: jax.Array
  layer: int | None
  inputs: int | None
  bias: bool
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    size = self.source.size if self.layer is None else self.source.size // self.source.shape[0]
    return size * self.dtype.itemsize

  def read(self) -> np.ndarray:
    array = np.asarray(self.source if self.layer is None else self.source[self.layer])
    if self.inputs is not None:
      array = array.reshape(np.prod(array.shape[: self.inputs]), -1).T
    elif self.bias:
      array = array.reshape(-1)
    return np.ascontiguousarray(array.astype(self.dtype))


def hf_tensors(params: Params, skeleton: Skeleton, config: ModelConfig, dtype) -> Iterator[tuple[str, _Tensor]]:
  for path, spec in skeleton.specs.items():
    for index, layer in enumerate(layer_paths(path, spec)):
      name = hf_name(layer, config)
      index = index if spec.stacked else None
      yield name, _Tensor(params[path], index, spec.inputs, path.endswith(".bias"), jnp.dtype(dtype))


def _write_config(file: Path, config: ModelConfig, dtype) -> None:
  content = json.loads(file.read_text())
  content["dtype"] = jnp.dtype(dtype).name
  if config.reward_head and not content["architectures"][0].endswith("ForSequenceClassification"):
    names = {family: name for name, family in (DECODERS | ENCODERS).items() if "Classification" in name}
    content["architectures"] = [names[config.family]]
    content |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
  file.write_text(json.dumps(content, indent=2) + "\n")


def _write_padding(folder: Path) -> None:
  """Names one padding token in configuration and tokenizer, such that no conversation ends with it.

  transformers reads a decoder's score at the last token that is not padding, and refuses batches without such a token.
  """
  chat = Chat.load(folder)
  last, tokenizer = chat.conversation_tokens(TURNS)[-1], chat.tokenizer
  candidates = [tokenizer.pad_token_id, *sorted(tokenizer.all_special_ids), 0, 1]
  padding = next(token for token in candidates if token not in (None, last))
  _update_json(folder / "config.json", {"pad_token_id": padding})
  if padding != tokenizer.pad_token_id:
    _update_json(folder / "tokenizer_config.json", {"pad_token": tokenizer.convert_ids_to_tokens(padding)})


def _update_json(file: Path, changes: Mapping[str, Any]) -> None:
  content = json.loads(file.read_text()) if file.is_file() else {}
  file.write_text(json.dumps(content | changes, indent=2) + "\n")

"""GGUF files of the Llama family to Hugging Face folders: configuration, weights, tokenizer; no PyTorch."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf import ReaderTensor, dequantize
from transformers import PreTrainedConfig

from tsalign_jax.models.gguf_config import ROPE_FREQS, GgufFile, read_gguf_config
from tsalign_jax.models.gguf_tokenizer import build_tokenizer, stop_ids
from tsalign_jax.models.shards import write_shards
from tsalign_jax.types import UserError

DTYPES = ("float32", "bfloat16", "float16")
RECORD = "gguf_import.json"  # what the folder was made from: by it, a repeated import knows its own work
_ATTENTION = {
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def import_gguf(source: Path, target: Path, dtype: str = "float32") -> None:
  """Writes the Hugging Face folder `target` from the GGUF file `source`; weights are dequantised to `dtype`.

  The folder appears only once it is complete; where it is this very import already, nothing is done. One
  safetensors shard is in host memory at a time. The chat template is written when the file has one.

  Raises UserError for a file that is not GGUF or is damaged, for an architecture, tokenizer, rope scaling or
  quantisation that we do not know, and when `target` holds anything else.
  """
  source, target = Path(source), Path(target)
  if dtype not in DTYPES:
    raise UserError(f"--dtype: {dtype!r} is unknown; use {', '.join(DTYPES)}")
  _check_magic(source)
  record = {"source": source.name, "sha256": _sha256(source), "dtype": dtype}
  if _is_this_import(target, record):
    return
  file = GgufFile(source)
  config = read_gguf_config(file, dtype)
  tensors = _tensors(file, config, jnp.dtype(dtype))
  tokenizer = build_tokenizer(file.metadata, str(source), config.max_position_embeddings)
  if len(tokenizer) > config.vocab_size:
    raise UserError(f"{source}: has {len(tokenizer)} tokens, but embeddings for only {config.vocab_size}")
  partial = target.with_name(f"{target.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # left by an import that was killed
  try:
    partial.mkdir(parents=True)
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _write_json(partial / "generation_config.json", _generation_config(config, stop_ids(file.metadata)))
    write_shards(partial, tensors)
    _write_json(partial / RECORD, record)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a query or key projection in the order of Hugging Face, from that of llama.cpp.

  Hugging Face rotates row i of a head together with row i + d/2, llama.cpp row 2i with row 2i + 1; so for its
  Llama models llama.cpp interleaves the two halves of each head. One head with d = 6:

      llama.cpp     0 3 1 4 2 5    [heads, d/2, 2, ...]
      Hugging Face  0 1 2 3 4 5    [heads, 2, d/2, ...]
  """
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Tensor(NamedTuple):
  """A tensor as Hugging Face stores it, read and dequantised only when it is written."""

  source: ReaderTensor
  heads: int | None  # of a projection whose rows llama.cpp permuted
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return int(self.source.n_elements) * self.dtype.itemsize

  def read(self) -> np.ndarray:
    # The shape, which GGUF lists in reverse, has been put right by its reader.
    array = dequantize(self.source.data, self.source.tensor_type)
    if self.heads is not None:
      array = unpermute(array, self.heads)
    return np.ascontiguousarray(array.astype(self.dtype))


def _check_magic(path: Path) -> None:
  if not path.is_file():
    raise UserError(f"{path}: there is no such file")
  with path.open("rb") as stream:
    magic = stream.read(4)
  if magic != b"GGUF":
    raise UserError(f"{path}: is not a GGUF file, it starts with {magic!r}")


def _sha256(path: Path) -> str:
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_this_import(target: Path, record: dict[str, str]) -> bool:
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return False
  if (target / RECORD).is_file() and json.loads((target / RECORD).read_text()) == record:
    return True
  raise UserError(f"{target}: already holds something else; name a new folder or remove this one")


def _generation_config(config: PreTrainedConfig, stop: list[int]) -> dict[str, Any]:
  ids = {"bos_token_id": config.bos_token_id, "eos_token_id": stop, "pad_token_id": config.pad_token_id}
  return {name: value for name, value in ids.items() if value not in (None, [])}


def _tensors(file: GgufFile, config: PreTrainedConfig, dtype: np.dtype) -> dict[str, _Tensor]:
  """Every tensor by its Hugging Face name; UserError for a missing, a strange or an unreadable one."""
  names = _names(file, config)
  unknown = sorted(file.tensors.keys() - names.keys() - {ROPE_FREQS})
  if unknown:
    raise UserError(f"{file.path}: tensor {unknown[0]} has no place in {config.architectures[0]}")
  heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
  permuted = heads if file.architecture == "llama" else {}
  tensors = {}
  for name, hf_name in names.items():
    tensor = file.tensor(name)
    _check_type(file, tensor)
    tensors[hf_name] = _Tensor(tensor, permuted.get(name.split(".")[-2]), dtype)
  return tensors


def _names(file: GgufFile, config: PreTrainedConfig) -> dict[str, str]:
  """The Hugging Face name of each tensor that a model of this configuration has, by its GGUF name."""
  biased = {"attn_q", "attn_k", "attn_v"} if file.architecture == "qwen2" else set()
  if getattr(config, "attention_bias", False):
    biased |= _ATTENTION.keys()
  if getattr(config, "mlp_bias", False):
    biased |= _MLP.keys()
  names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
  if not config.tie_word_embeddings:
    names["output.weight"] = "lm_head.weight"
  for layer in range(config.num_hidden_layers):
    for part, module in (_ATTENTION | _MLP | _NORMS).items():
      for kind in ("weight", "bias") if part in biased else ("weight",):
        names[f"blk.{layer}.{part}.{kind}"] = f"model.layers.{layer}.{module}.{kind}"
  return names


def _check_type(file: GgufFile, tensor: ReaderTensor) -> None:
  try:
    dequantize(tensor.data[:1], tensor.tensor_type)  # one row, so that a bad type stops us before any work
  except NotImplementedError as error:
    kind = tensor.tensor_type.name
    raise UserError(f"{file.path}: tensor {tensor.name} is of type {kind}, which is not supported") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")

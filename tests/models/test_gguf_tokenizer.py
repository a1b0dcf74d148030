"""Tokenizers rebuilt from GGUF against llama.cpp's algorithm, spelled out plainly."""

import itertools

import gguf_vocabulary
import pytest
import transformers as hf

from tsalign_jax.models.gguf_tokenizer import build_tokenizer, stop_ids
from tsalign_jax.types import UserError


def rebuild(metadata: dict, folder) -> hf.PreTrainedTokenizerBase:
  """The tokenizer as a user meets it: saved, then loaded by AutoTokenizer."""
  build_tokenizer(metadata, "model.gguf", 128).save_pretrained(folder)
  hf.LlamaConfig().save_pretrained(folder)
  return hf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("pre", gguf_vocabulary.PATTERNS)
def test_byte_level_tokens_equal_those_of_llama_cpp(pre, tmp_path):
  metadata = gguf_vocabulary.byte_level(pre)
  tokenizer = rebuild(metadata, tmp_path)
  for text in gguf_vocabulary.TEXTS:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == gguf_vocabulary.byte_level_ids(metadata, text), text
    assert tokenizer.decode(ids) == text


def test_pre_tokenizers_differ_on_the_texts():
  texts, vocabularies = gguf_vocabulary.TEXTS, [*map(gguf_vocabulary.byte_level, gguf_vocabulary.PATTERNS)]
  ids = [[gguf_vocabulary.byte_level_ids(vocabulary, text) for text in texts] for vocabulary in vocabularies]
  assert all(left != right for left, right in itertools.combinations(ids, 2))


def test_qwen2_composes_accents_first(tmp_path):
  tokenizer = rebuild(gguf_vocabulary.byte_level("qwen2"), tmp_path)
  assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_tokens_equal_those_of_llama_cpp(seed, prefix, tmp_path):
  metadata = gguf_vocabulary.sentencepiece(seed) | {"tokenizer.ggml.add_space_prefix": prefix}
  tokenizer = rebuild(metadata, tmp_path)
  for text in ["abc dead bead cab", "a  bcd   e", "xyz é 🦙\n\tab", "[INST] abba [INST]da", "edcba" * 20]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == gguf_vocabulary.sentencepiece_ids(metadata, text), text
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
  assert tokenizer.decode(tokenizer.encode("ab cd", add_special_tokens=False)) == "ab cd"


BYTE_LEVEL, SENTENCEPIECE = gguf_vocabulary.byte_level, gguf_vocabulary.sentencepiece
ENDS = {
  "smollm adds nothing": (BYTE_LEVEL("smollm"), {}, [], []),
  "llama 3 adds bos": (BYTE_LEVEL("llama-bpe"), {}, [1], []),
  "a file may decline": (BYTE_LEVEL("llama-bpe"), {"add_bos_token": False}, [], []),
  "a file may ask for both": (BYTE_LEVEL("smollm"), {"add_bos_token": True, "add_eos_token": True}, [1], [0]),
  "sentencepiece adds bos": (SENTENCEPIECE(0), {}, [1], []),
  "no bos, none added": (BYTE_LEVEL("llama-bpe"), {"bos_token_id": 2**32 - 1}, [], []),
}


@pytest.mark.parametrize("case", ENDS)
def test_bos_and_eos_are_added_as_the_file_says(case, tmp_path):
  metadata, flags, before, after = ENDS[case]
  metadata = metadata | {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
  tokenizer = rebuild(metadata, tmp_path)
  assert tokenizer.encode("abc") == [*before, *tokenizer.encode("abc", add_special_tokens=False), *after]


def test_special_tokens_are_named_kept_whole_and_left_out_of_answers(tmp_path):
  metadata = BYTE_LEVEL() | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
  tokenizer = rebuild(metadata, tmp_path)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 3)
  assert tokenizer.unk_token is None and len(tokenizer) == 300
  ids = tokenizer.encode("a<|im_end|><tool>b")
  assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"
  text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
  assert text == "<|im_start|>Hi"
  assert build_tokenizer(BYTE_LEVEL(), "model.gguf", 128).chat_template is None


def test_stop_tokens_are_those_stated_and_those_the_template_writes():
  metadata = BYTE_LEVEL()
  assert stop_ids(metadata) == [0]
  assert stop_ids(metadata | {"tokenizer.chat_template": "...<|im_end|>"}) == [0, 2]
  assert stop_ids(metadata | {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 0}) == [0, 9]
  assert stop_ids(SENTENCEPIECE(0)) == [2]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"tokenizer.ggml.model": "t5"}, "model.gguf: tokenizer.ggml.model t5 is not supported; known are gpt2"),
    ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None is not supported; known are smollm"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "holds a token twice"),
  ],
)
def test_other_tokenizers_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    build_tokenizer(BYTE_LEVEL() | change, "model.gguf", 128)

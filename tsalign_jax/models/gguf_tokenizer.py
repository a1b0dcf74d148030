"""The tokenizer that a GGUF file describes, rebuilt as a fast Hugging Face tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tsalign_jax.types import UserError

Metadata = Mapping[str, Any]
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
# Tokens that end a turn: older files name only the one that ends a document, and the template tells these.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


class _Style(NamedTuple):
  """How text is cut into words before byte-level merges: each step cuts the pieces of the one before it."""

  steps: Sequence[pre_tokenizers.PreTokenizer]
  whole_words: bool = False  # a word of the vocabulary is one token even where no merges lead to it
  nfc: bool = False
  add_bos: bool = False


_DIGITS = _Style((pre_tokenizers.Digits(individual_digits=True), _GPT2_BYTES))
_LLAMA3 = _Style((_split(_LLAMA3_WORDS), _BYTES), whole_words=True, add_bos=True)
_QWEN2 = _Style((_split(_QWEN2_WORDS), _BYTES), nfc=True)
_TEKKEN = _Style((_split(_TEKKEN_WORDS), _BYTES), whole_words=True, add_bos=True)
_PUNCTUATION = _split(r"[\p{P}\$\+<=>\^~\|]+")
_STYLES = {
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "refact": _DIGITS,
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "falcon3": _LLAMA3,
  "smaug-bpe": _Style((_split(_LLAMA3_WORDS), _BYTES)),
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
  "tekken": _TEKKEN,
  "gpt-2": _Style((_GPT2_BYTES,)),
  "default": _Style((_PUNCTUATION, _split(_GPT2_WORDS), _split(r"\p{N}+"), _split("[0-9]{3}"), _BYTES)),
}


def build_tokenizer(metadata: Metadata, where: str, max_length: int) -> PreTrainedTokenizerFast:
  """The tokenizer of a GGUF file, with its special tokens and, if there is one, its chat template.

  `tokenizer.ggml.model` is gpt2 (byte-level BPE; `tokenizer.ggml.pre` says how words are cut) or llama
  (SentencePiece BPE). Raises UserError, which starts with `where`, for any other.
  """
  kind = metadata.get("tokenizer.ggml.model")
  if kind not in ("gpt2", "llama"):
    raise UserError(f"{where}: tokenizer.ggml.model {kind} is not supported; known are gpt2, llama")
  parts = ("tokens", "merges") if kind == "gpt2" else ("tokens", "scores")
  for part in parts:
    if not metadata.get(f"tokenizer.ggml.{part}"):
      raise UserError(f"{where}: tokenizer.ggml.{part} is missing, so its tokenizer cannot be rebuilt")
  tokens = metadata["tokenizer.ggml.tokens"]
  if len(set(tokens)) < len(tokens):
    raise UserError(f"{where}: tokenizer.ggml.tokens holds a token twice")
  style = _style(metadata, where) if kind == "gpt2" else _Style((), add_bos=True)
  backend = _byte_level(metadata, style) if kind == "gpt2" else _sentencepiece(metadata)
  backend.add_tokens(_added_tokens(metadata))
  ids = {name: token for name, token in special_ids(metadata).items() if token is not None}
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", style.add_bos) and "bos" in ids,
    add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False) and "eos" in ids,
    chat_template=metadata.get("tokenizer.chat_template"),
    clean_up_tokenization_spaces=False,
    model_max_length=max_length,
    **{f"{name}_token": tokens[token] for name, token in ids.items()},
  )


def special_ids(metadata: Metadata) -> dict[str, int | None]:
  """The ids of the bos, eos, unk and pad tokens, None where the file names none."""
  ids = {"bos": None, "eos": None, "unk": None, "pad": None}
  if metadata.get("tokenizer.ggml.model") == "llama":
    ids |= {"bos": 1, "eos": 2, "unk": 0}  # SentencePiece's own, which files need not repeat
  keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
  stated = {name: _token_id(metadata, key) for name, key in keys.items()}
  return ids | {name: token for name, token in stated.items() if token is not None}


def stop_ids(metadata: Metadata) -> list[int]:
  """The ids at which a response ends: of the document, of a turn or of a message to a tool; eos first."""
  tokens, template = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.chat_template", "")
  stated = [special_ids(metadata)["eos"], _token_id(metadata, "eot"), _token_id(metadata, "eom")]
  written = [tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens]
  return list(dict.fromkeys(token for token in stated + written if token is not None))


def _token_id(metadata: Metadata, key: str) -> int | None:
  token = metadata.get(f"tokenizer.ggml.{key}_token_id")
  # Some converters write -1, as an unsigned number, for "none".
  return token if token is not None and token < len(metadata.get("tokenizer.ggml.tokens", [])) else None


def _style(metadata: Metadata, where: str) -> _Style:
  name = metadata.get("tokenizer.ggml.pre")
  if name not in _STYLES:
    raise UserError(f"{where}: tokenizer.ggml.pre {name} is not supported; known are {', '.join(_STYLES)}")
  return _STYLES[name]


def _vocabulary(metadata: Metadata) -> dict[str, int]:
  return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: Metadata, style: _Style) -> Tokenizer:
  merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
  backend = Tokenizer(BPE(_vocabulary(metadata), merges, ignore_merges=style.whole_words))
  if style.nfc:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(list(style.steps))
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(metadata: Metadata) -> Tokenizer:
  unknown = metadata["tokenizer.ggml.tokens"][special_ids(metadata)["unk"]]
  model = BPE(_vocabulary(metadata), _merges(metadata), unk_token=unknown, fuse_unk=True, byte_fallback=True)
  backend = Tokenizer(model)
  prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
  start = [normalizers.Prepend("▁")] if prefix else []
  backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
  end = [decoders.Strip(" ", 1, 0)] if prefix else []
  to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence([*to_text, *end])
  return backend


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
  """Merges for a vocabulary with scores.

  SentencePiece joins the neighbours whose union scores best; so every way to cut a token in two known tokens
  is a merge, and merges of better tokens come first.
  """
  tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
  types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
  normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
  best_first = sorted(normal, key=normal.__getitem__, reverse=True)
  cuts = ((token[:cut], token[cut:]) for token in best_first for cut in range(1, len(token)))
  return [(left, right) for left, right in cuts if left in normal and right in normal]


def _added_tokens(metadata: Metadata) -> list[AddedToken]:
  """Tokens that are matched whole before the text is cut into words; special ones are no text to a reader."""
  types = metadata.get("tokenizer.ggml.token_type") or []
  added = (UNKNOWN, CONTROL, USER_DEFINED)
  return [
    AddedToken(token, special=kind != USER_DEFINED, normalized=False)
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False)
    if kind in added
  ]

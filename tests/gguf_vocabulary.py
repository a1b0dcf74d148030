"""Tiny GGUF vocabularies, and llama.cpp's way to tokenise: slow, plain and apart from what it tests."""

import itertools
import random
import string
import unicodedata

import regex

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
MERGES = """
  Ġ-Ġ ĠĠ-ĠĠ 1-2 12-3 3-4 12-34 0-0 00-0 Ġ-1 Ġ1-2 h-e l-l he-ll hell-o '-s Ċ-Ċ Ċ-ĠĠ i-n Ã-¯ Ã-© Ġ-x t-u tu-r
  tur-n Ġ-= ,-Ġ !-! o-Ġ ĠĠ-1 Ġ-$
"""
WORDS = ["Hello", "987", "<tool>"]  # two words to which no merge leads, and a token that the user defined
TEXTS = [
  "Hello, hello! It's 1234 and 3.14, they'LL say 1000000 987!!",
  "naïve Ωmega 🦙 日本語 ½ ٣٤ Ⅷ caf\u00e9 CamelCase",
  "def f(x):\n    return x**2  # 10\n\n\n    y = 3\r\n\t\t42\t",
  "a  12   b <=> $5 ~ ||  'tis <|im_end|> x<|x|>\u00a0 y   ",
  "<|im_start|>user\nHi <tool><|im_end|>\n",
  "   ",
  "",
]
# As llama.cpp spells them: each cuts the pieces that the one before it has left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
  "smollm": [r"\p{N}", _GPT2],
  "gpt-2": [_GPT2],
  "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
  "llama-bpe": [_ENGLISH + r"\p{N}{1,3}" + _SPACES],
  "qwen2": [_ENGLISH + r"\p{N}" + _SPACES],
  "tekken": [_TEKKEN],
}


def _byte_letters() -> dict[int, str]:
  """GPT-2's letter for each byte: itself where it can be printed, else one from 256 on."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [byte for byte in range(256) if byte not in printable]
  letters = {byte: chr(256 + index) for index, byte in enumerate(others)}
  return letters | {byte: chr(byte) for byte in printable}


LETTERS = _byte_letters()


def byte_level(pre: str = "smollm") -> dict:
  """The metadata of a byte-level vocabulary of 300 tokens."""
  merges = [merge.replace("-", " ") for merge in MERGES.split()]
  tokens = SPECIAL + sorted(LETTERS.values()) + [merge.replace(" ", "") for merge in merges] + WORDS
  tokens += [f"[PAD{index}]" for index in range(len(tokens), 300)]
  unused = [token for token in tokens if token.startswith("[PAD")]
  types = {"<tool>": 4} | dict.fromkeys(SPECIAL, 3) | dict.fromkeys(unused, 5)
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 3,
  }


def sentencepiece(seed: int) -> dict:
  """The metadata of a SentencePiece vocabulary whose pieces have random scores."""
  draw = random.Random(seed)
  pieces = {"▁", *string.ascii_lowercase}
  while len(pieces) < 300:
    pieces.add("".join(draw.choices("▁abcdeab", k=draw.randint(2, 4))))
  pieces = sorted(pieces)
  scores = draw.sample(range(-1000, 0), len(pieces))
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "[INST]"]
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
    "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in scores] + [0.0],
  }


def byte_level_ids(metadata: dict, text: str) -> list[int]:
  """The tokens of a text, without BOS and EOS."""
  index = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
  values = {tuple(merge.split(" ")): -rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
  pre = metadata["tokenizer.ggml.pre"]
  ids = []
  for fragment, added in _fragments(metadata, text):
    if added:
      ids.append(index[fragment])
      continue
    if pre == "qwen2":  # llama.cpp leaves this out, the model's own tokenizer does it
      fragment = unicodedata.normalize("NFC", fragment)
    for word in _words([fragment], PATTERNS[pre]):
      letters = "".join(LETTERS[byte] for byte in word.encode())
      whole = pre in ("llama-bpe", "tekken") and letters in index
      parts = [letters] if whole else _merge(list(letters), lambda *pair: values.get(pair))
      ids += [index[part] for part in parts]
  return ids


def sentencepiece_ids(metadata: dict, text: str) -> list[int]:
  """The tokens of a text, without BOS and EOS."""
  tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
  index = {token: number for number, token in enumerate(tokens)}
  rows = zip(tokens, metadata["tokenizer.ggml.scores"], types, strict=True)
  scores = {token: score for token, score, kind in rows if kind == 1}
  ids = []
  for fragment, added in _fragments(metadata, text):
    if added:
      ids.append(index[fragment])
      continue
    prefix = " " if metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
    letters = list((prefix + fragment).replace(" ", "▁"))
    for part in _merge(letters, lambda left, right: scores.get(left + right)):
      ids += [index[part]] if part in index else [index[f"<0x{byte:02X}>"] for byte in part.encode()]
  return ids


def _fragments(metadata: dict, text: str):
  rows = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
  added = sorted((token for token, kind in rows if kind in (2, 3, 4)), key=len, reverse=True)
  pieces = regex.split("(" + "|".join(map(regex.escape, added)) + ")", text)
  return [(piece, piece in added) for piece in pieces if piece]


def _words(pieces: list[str], patterns: list[str]) -> list[str]:
  for pattern in patterns:
    pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
  return pieces


def _merge(parts: list[str], value) -> list[str]:
  """Joins the best pair of neighbours, the leftmost of equals, until no pair has a value."""
  while True:
    values = [(value(*pair), -place) for place, pair in enumerate(itertools.pairwise(parts))]
    best = max((item for item in values if item[0] is not None), default=None)
    if best is None:
      return parts
    place = -best[1]
    parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]

"""Prompts and preference pairs from and to files, in the formats that TRL reads; and what files hold, as a hash."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tsalign_jax.types import Conversation, PreferencePair, Prompt, UserError

Row = TypeVar("Row")
ROLES = ("system", "user", "assistant")
HELD_OUT = "the prompt is held out"  # why a row is not learned from


def read_prompts(source: str) -> list[Prompt]:
  """The prompts of a jsonl or parquet file or of a dataset NAME@SPLIT: a `prompt`, as text or as messages.

  Raises UserError that names the file and the row, when a row has no prompt or no user turn.
  """
  prompts = []
  for index, row in enumerate(read_rows(source)):
    where = f"{source}: row {index + 1}"
    if "prompt" not in row:
      raise UserError(f"{where}: no `prompt`; its keys are {', '.join(row)}")
    messages = conversation(row["prompt"], where)
    if messages[-1]["role"] != "user":
      raise UserError(f"{where}: the prompt must end with a user turn, this one ends with {messages[-1]['role']!r}")
    checks = row.get("checks") or []
    if not isinstance(checks, list):
      raise UserError(f"{where}: `checks` is a list of {{name: ..., ...}}, this one is {checks!r}")
    prompts.append(Prompt(index, messages, tuple(checks)))
  if not prompts:
    raise UserError(f"{source}: there is no row in it")
  return prompts


def read_preferences(source: str, *, margin: str | None = None) -> list[PreferencePair]:
  """The preference pairs of a file or dataset: prompt (or a shared start), chosen and rejected, text or messages.

  `margin` names the column that holds by how much the chosen response is better; without it all margins are 0.
  """
  pairs = []
  for index, row in enumerate(read_rows(source)):
    where = f"{source}: row {index + 1}"
    for key in ("chosen", "rejected"):
      if key not in row:
        raise UserError(f"{where}: no `{key}`; its keys are {', '.join(row)}")
    pair = _preference(row, where)
    pairs.append(pair._replace(margin=_margin(row, margin, where)) if margin else pair)
  if not pairs:
    raise UserError(f"{source}: there is no row in it")
  return pairs


def prompt_key(messages: Conversation) -> str:
  """The same for equal prompts, wherever they were read."""
  return json.dumps([[message["role"], message["content"]] for message in messages])


def evenly(rows: Sequence[Row], most: int) -> Sequence[Row]:
  """At most so many rows, from everywhere in a list that may be sorted by where they came from."""
  count = min(most, len(rows))
  return [rows[index * len(rows) // count] for index in range(count)]


def read_rows(source: str) -> Iterator[dict[str, Any]]:
  """The rows of a jsonl or parquet file, or of a dataset NAME@SPLIT that `datasets` can load."""
  path = Path(source)
  if path.suffix in (".jsonl", ".parquet") and not path.is_file():
    raise UserError(f"{source}: there is no such file")
  if path.suffix == ".jsonl":
    return _read_jsonl(path)
  if path.suffix == ".parquet":
    return _read_parquet(path)
  name, at, split = source.partition("@")
  if not at:
    raise UserError(f"{source}: give a .jsonl or .parquet file, or a dataset as NAME@SPLIT")
  import datasets  # takes a second to import, and most runs read files

  try:
    return iter(datasets.load_dataset(name, split=split))
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise UserError(f"{source}: `datasets` cannot load it ({str(error).splitlines()[0]})") from error


def conversation(value: Any, where: str) -> Conversation:
  """A prompt as messages: text is one user turn. Raises UserError for anything else, or without a user turn."""
  if isinstance(value, str) and value.strip():
    return [{"role": "user", "content": value}]
  if not isinstance(value, list) or not value:
    raise UserError(f"{where}: a prompt is text or a list of messages, this one is {value!r}")
  for message in value:
    valid = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
    if not valid:
      raise UserError(f"{where}: a message is {{role: {' | '.join(ROLES)}, content: text}}, this one is {message!r}")
  if not any(message["role"] == "user" and message["content"].strip() for message in value):
    raise UserError(f"{where}: the prompt has no user turn; add a message with role user and some content")
  return [{"role": message["role"], "content": message["content"]} for message in value]


def write_jsonl(rows: Sequence[dict], path: str | Path) -> Path:
  """The path, now a file of one JSON object a line, complete or not there at all."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".tmp")
  unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
  return unfinished.replace(path)


def fingerprint(path: Path) -> str:
  """SHA-256 of a file, or of the names and contents of all files below a folder.

  Remembered while size and modification time stay: a model is read by many stages.
  """
  path = Path(path)
  files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
  total = hashlib.sha256()
  for file in files:
    stat = file.stat()
    total.update(f"{file.relative_to(path) if path.is_dir() else ''}\0".encode())
    total.update(_file_digest(file, stat.st_size, stat.st_mtime_ns).encode())
  return total.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, modified: int) -> str:
  with file.open("rb") as content:
    return hashlib.file_digest(content, "sha256").hexdigest()


def _preference(row: dict, where: str) -> PreferencePair:
  chosen, rejected = row["chosen"], row["rejected"]
  whole = all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
  if whole:  # two conversations that differ in their last turn
    if chosen[:-1] != rejected[:-1]:
      raise UserError(f"{where}: chosen and rejected are conversations that differ before their last turn")
    start = conversation(_begun(row.get("prompt"), chosen[:-1], where), where)
    return PreferencePair(start, _response(chosen[-1:], where), _response(rejected[-1:], where))
  if "prompt" not in row:
    raise UserError(f"{where}: no `prompt`, and chosen and rejected are not conversations that begin with one")
  return PreferencePair(conversation(row["prompt"], where), _response(chosen, where), _response(rejected, where))


def _begun(prompt: Any, turns: list, where: str) -> list:
  """The turns with the prompt before them, unless they repeat it, as they do in many data sets."""
  if prompt is None:
    return turns
  before = conversation(prompt, where)
  said = [(turn["role"], turn["content"].strip()) for turn in conversation([*before, *turns], where)]
  first, rest = said[: len(before)], said[len(before) :]
  if any(rest[start : start + len(first)] == first for start in range(len(rest))):
    return turns
  if rest[0][0] == first[-1][0]:
    raise UserError(f"{where}: chosen and rejected begin with another {rest[0][0]} turn than `prompt` ends with")
  return [*before, *turns]


def _margin(row: dict, column: str, where: str) -> float:
  if column not in row:
    raise UserError(f"{where}: no `{column}`, which was to be its margin; its keys are {', '.join(row)}")
  value = row[column]
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise UserError(f"{where}: `{column}`, its margin, is a number, this one is {value!r}")
  return float(value)


def _response(value: Any, where: str) -> str:
  if isinstance(value, str):
    return value
  if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
    content = value[0].get("content")
    if isinstance(content, str):
      return content
  raise UserError(f"{where}: a response is text or one assistant message, this one is {value!r}")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
  try:
    return iter(pq.read_table(path).to_pylist())
  except (pa.ArrowInvalid, OSError) as error:
    raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
  with path.open(encoding="utf-8", errors="surrogateescape") as lines:
    for number, line in enumerate(lines, 1):
      if any("\udc80" <= character <= "\udcff" for character in line):
        raise UserError(f"{path}: line {number} is not UTF-8 text; save the file as UTF-8")
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not valid JSON ({error.msg} at column {error.colno})") from error
      if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{path}: line {number} holds half a character (\\ud800 to \\udfff alone); remove it")
      if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is a {type(row).__name__}, not an object with keys")
      yield row

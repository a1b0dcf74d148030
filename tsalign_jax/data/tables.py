"""The tables of a run folder: parquet files with one fixed schema each."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsalign_jax.types import Prompt, UserError

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("prompt", _MESSAGES),
    ("checks", pa.string()),  # JSON: checks differ in their arguments
    ("tokens", pa.list_(pa.int32())),
    ("dropped", pa.string()),  # why this row is not used; null where it is
  ]
)
RESPONSES = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("response_id", pa.int32()),
    ("tokens", pa.list_(pa.int32())),
    ("text", pa.string()),
    ("logprob", pa.float64()),  # nats, at temperature 1
    ("finish", pa.string()),
  ]
)
SCORES = pa.schema([("prompt_id", pa.int64()), ("response_id", pa.int32()), ("score", pa.float64())])
CANDIDATES = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("first", pa.int32()),  # response ids
    ("second", pa.int32()),
    ("margin", pa.float64()),  # student score of first minus second; null where no student was asked
    ("dropped", pa.string()),
  ]
)
VERDICTS = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("first", pa.int32()),
    ("second", pa.int32()),
    ("verdict", pa.string()),
    ("probability", pa.float64()),
    ("evidence", pa.string()),  # JSON
  ]
)
PAIRS = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("prompt", _MESSAGES),
    ("chosen", _MESSAGES),  # prompt, chosen, rejected: the conversational format that TRL reads
    ("rejected", _MESSAGES),
    ("prompt_tokens", pa.list_(pa.int32())),
    ("chosen_tokens", pa.list_(pa.int32())),  # as sampled, so that log-probabilities are exact
    ("rejected_tokens", pa.list_(pa.int32())),
    ("flipped", pa.bool_()),  # the teacher reversed the student's order; null where either has none
  ]
)
REWARD_SCORES = pa.schema(
  [
    ("row", pa.int64()),  # of the held-out pairs
    ("chosen_score", pa.float64()),
    ("rejected_score", pa.float64()),
    ("chosen_length", pa.int64()),  # in characters
    ("rejected_length", pa.int64()),
    ("cut", pa.bool_()),  # the model did not read all of it
  ]
)
COMPARISONS = pa.schema(
  [
    ("prompt_id", pa.int64()),
    ("response_id", pa.int32()),
    ("prompt", _MESSAGES),
    ("base", pa.string()),
    ("policy", pa.string()),
    ("verdict", pa.string()),  # "first" is the policy
    ("evidence", pa.string()),
    ("others", pa.string()),  # verdicts of other judges, by name, as JSON
  ]
)

Rows = list[dict[str, Any]]


def write_table(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
  """Writes rows as parquet; the file appears whole or not at all, and its content is on disk before it appears."""
  temporary = Path(f"{path}.tmp")
  with temporary.open("wb") as out:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), out)
    out.flush()
    os.fsync(out.fileno())
  temporary.replace(path)


def read_table(path: Path, *, used_only: bool = False) -> Rows:
  """The rows of a table; with `used_only`, those without a reason to be dropped. UserError where it is damaged."""
  try:
    rows = pq.read_table(path).to_pylist()
  except (pa.ArrowInvalid, OSError) as error:
    raise UserError(
      f"{path}: damaged ({str(error).splitlines()[0]}); restore it; in a .partial folder, delete it"
    ) from error
  return [row for row in rows if row["dropped"] is None] if used_only else rows


def to_prompt(row: dict[str, Any]) -> Prompt:
  """The prompt of a row of the prompts table."""
  return Prompt(row["prompt_id"], row["prompt"], tuple(json.loads(row["checks"])))


def by_prompt(rows: Rows) -> dict[int, Rows]:
  """Rows grouped by prompt id, in the order in which they come."""
  groups: dict[int, Rows] = {}
  for row in rows:
    groups.setdefault(row["prompt_id"], []).append(row)
  return groups

"""A run in which only judging matters: tables of candidates, and a run of nothing but the stages that judge.

As a program, `python judging.py RUN_CONFIG`, it runs those stages as `tsalign run` would: to be killed by a test.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import yaml
from rich.console import Console

from tsalign_jax import loop
from tsalign_jax.config import Config, load_config
from tsalign_jax.data.tables import CANDIDATES, PROMPTS, RESPONSES, write_table
from tsalign_jax.progress import terminal_progress
from tsalign_jax.recipes.step import Step
from tsalign_jax.stages.base import Job
from tsalign_jax.stages.judge import judge
from tsalign_jax.stages.pair import pair
from tsalign_jax.types import CandidatePair, Prompt

QUIET = terminal_progress(Console(quiet=True))


def config_file(folder: Path, teacher: dict, **changes) -> Path:
  """A configuration whose models do not exist, with this teacher."""
  content = {
    "run": str(folder / "run"),
    "policy": {"path": "nowhere"},
    "student": {"path": "nowhere"},
    "prompts": {"train": "nowhere.jsonl", "heldout": "nowhere.jsonl"},
    "teacher": teacher,
  }
  file = folder / "config.yaml"
  file.write_text(yaml.safe_dump(content | changes))
  return file


def write_inputs(folder: Path, pairs: Sequence[CandidatePair]) -> None:
  """What the stages read: a prompt with two responses for each pair."""
  folder.mkdir(parents=True, exist_ok=True)
  prompts = [pair.prompt for pair in pairs]
  responses = [(each.prompt.id, k, text) for each in pairs for k, text in enumerate((each.first, each.second))]
  write_table(folder / "prompts.parquet", [_prompt(each) for each in prompts], PROMPTS)
  write_table(folder / "responses.parquet", [_response(*each) for each in responses], RESPONSES)
  rows = [{"prompt_id": each.id, "first": 0, "second": 1, "margin": 1.0, "dropped": None} for each in prompts]
  write_table(folder / "candidates.parquet", rows, CANDIDATES)


def _prompt(prompt: Prompt) -> dict:
  return {"prompt_id": prompt.id, "prompt": prompt.messages, "checks": "[]", "tokens": [1], "dropped": None}


def _response(prompt_id: int, k: int, text: str) -> dict:
  row = {"prompt_id": prompt_id, "response_id": k, "tokens": [1], "text": text}
  return row | {"logprob": -1.0, "finish": "stop"}


def job(name: str, config: Config, folder: Path) -> Job:
  """One run of a stage on the inputs in a folder, which it also writes to."""
  reads = {each: folder / f"{each}.parquet" for each in ("prompts", "responses", "candidates", "verdicts")}
  writes = {"verdicts": folder / "verdicts.parquet", "pairs": folder / "pairs.parquet"}
  job = Job(f"round_01/{name}", reads, writes, folder / f"{name}.partial", {}, config, None, QUIET(name))
  return dataclasses.replace(job, reads={role: path for role, path in reads.items() if path.exists()})


def steps(config: Config):
  """The stages of a recipe that does nothing but judge what lies beside the configuration."""
  inputs, out = config.run.parent / "inputs", config.run / "round_01"
  reads = {name: inputs / f"{name}.parquet" for name in ("prompts", "responses", "candidates")}
  yield Step("round_01/judge", judge, reads, {"verdicts": "verdicts.parquet"})
  yield Step("round_01/pair", pair, reads | {"verdicts": out / "verdicts.parquet"}, {"pairs": "pairs.parquet"})


def run(config: Config) -> None:
  """Runs these stages with all that surrounds them: lock, configuration, manifest, teacher, resuming."""
  with mock.patch.multiple(loop, ts_align=steps, check_inputs=lambda config: (loop.build_teacher(config), {})):
    loop.run(config, QUIET)


if __name__ == "__main__":
  run(load_config(Path(sys.argv[1])))

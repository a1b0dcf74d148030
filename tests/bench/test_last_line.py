"""Every benchmark ends with one line: a flat JSON object of ratios, ours to the peer's."""

import importlib
import json
import sys
import types

import pytest

from benchmarks.contest import OURS
from benchmarks.terminal import command
from tsalign_jax.types import Prompt

TOKENS = {"prompt_tokens": [1, 2], "chosen_tokens": [3], "rejected_tokens": [4]}
INPUTS = {
  "load_chat": lambda options: types.SimpleNamespace(prompt_tokens=lambda messages: [1, 2], stop_tokens=(2,)),
  "prompts": lambda options, count: [Prompt(0, [{"role": "user", "content": "hi"}])],
  "pairs": lambda options, count, **sizes: [TOKENS] * 4,
  "texts_to_score": lambda options, count, responses, **sizes: [],
  "reward_model": lambda options, kind: f"models/{kind}",
}
ENDS = {
  "sampling": {"sampling": 3.0, "sampling_fixed": 3.0},
  "scoring": {"scoring_decoder": 3.0, "scoring_encoder": 3.0},
  "dpo": {"dpo_step": 3.0, "dpo_memory": 0.5},
  "round": {"round": 3.0, "round_with_compilation": 2.0},
}


def run(seconds: float, peak: float, compiling: float) -> dict[str, float]:
  return {"units": 12, "seconds": seconds, "peak_gib": peak, "compiling": compiling}


@pytest.mark.parametrize("name", ENDS)
def test_the_last_line_is_an_object_of_ratios(name, monkeypatch, capsys):
  module = importlib.import_module(f"benchmarks.{name}")
  for each in INPUTS.keys() & vars(module).keys():
    monkeypatch.setattr(module, each, INPUTS[each])
  runs = {OURS: [run(1.0, 2.0, 0.5)] * 3, module.PEER: [run(3.0, 4.0, 0.0)] * 3}
  monkeypatch.setattr(module, "contest", lambda *_, **__: print("a table") or runs)
  monkeypatch.setattr(sys, "argv", [name])
  command(module.main)
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ENDS[name]


@pytest.mark.parametrize("runs", ["0", "-3", "many"])
def test_runs_that_are_none_are_refused(runs, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["sampling", "--runs", runs])
  with pytest.raises(SystemExit):
    command(importlib.import_module("benchmarks.sampling").main)
  assert f"{runs!r} is no number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tunix", "--llama-cpp", "--gguf"])
def test_a_peer_that_is_not_there_is_refused(option, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["sampling", option, "no/such/thing"])
  with pytest.raises(SystemExit):
    command(importlib.import_module("benchmarks.sampling").main)
  assert "'no/such/thing'" in capsys.readouterr().err

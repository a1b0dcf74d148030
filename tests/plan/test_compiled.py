"""Programs of an 8B model compiled for TPU slices that are not there: `pytest -m plan`, some minutes a slice."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from tsalign_jax.parallel.topology import ENVIRONMENT

pytestmark = [
  pytest.mark.plan,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra `tpu`"),
]

HBM = {"v5e:4x4": 15.75 * 2**30, "v5p:2x2x4": 95.74 * 2**30}  # usable, of each device
LLAMA_8B = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 128256,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-5,
  "hidden_act": "silu",
  "tie_word_embeddings": False,
  "rope_parameters": {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
}


@pytest.fixture(scope="module", params=HBM)
def topology(request):
  return request.param


@pytest.fixture(scope="module")
def known(topology, tmp_path_factory):
  """What `programs.py` says about each program."""
  folder = tmp_path_factory.mktemp("llama")
  tiny.tokenizer(folder)
  (folder / "config.json").write_text(json.dumps(LLAMA_8B))
  script = Path(__file__).with_name("programs.py")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | ENVIRONMENT
  command = [sys.executable, str(script), topology, str(folder)]
  run = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


def test_traffic_of_a_known_loop_is_what_it_reads(known):
  loops = known["loops"]
  assert loops["in_place"] == pytest.approx(loops["expected"], rel=0.03)
  assert loops["copied"] > 1.8 * loops["expected"]


def test_attention_is_the_kernel(known):
  kernels = {name: facts["kernels"] for name, facts in known["programs"].items()}
  # One for each kind of layer: forward, and for a gradient forward again, dq and dkv.
  assert kernels == {"prefill": 1, "decode": 0, "score": 1, "accumulate": 4, "update": 0, "gemma": 8, "short": 8}


def test_programs_fit(known, topology):
  for name, facts in known["programs"].items():
    assert facts["peak"] + facts.get("beside", 0) < HBM[topology], name


def test_decoding_reads_weights_and_caches_once(known):
  decode = known["programs"]["decode"]
  assert decode["ideal"] <= decode["moved"] <= 1.3 * decode["ideal"]

"""Peers that live in Python environments of their own, because their requirements contradict ours."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Settings, Side
from tsalign_jax.types import UserError

TUNIX = [{"batch": batch} for batch in (8, 4, 16)]
LLAMA_CPP = [{"batch": batch} for batch in (32, 16, 8)]  # prompts


def add_tunix(parser: argparse.ArgumentParser) -> None:
  """The option that names the interpreter."""
  parser.add_argument(
    "--tunix", metavar="PYTHON", type=_program, help="interpreter of an environment with google-tunix"
  )


def tunix(options: argparse.Namespace, contender: str, candidates: Sequence[Settings] = TUNIX) -> list[Side]:
  """This side, if its interpreter was named."""
  return [Side("tunix", f"benchmarks.tunix_peer:{contender}", candidates, options.tunix)] if options.tunix else []


def add_llama_cpp(parser: argparse.ArgumentParser) -> None:
  """The options that name the interpreter and the model."""
  parser.add_argument(
    "--llama-cpp", metavar="PYTHON", type=_program, help="interpreter of an environment with llama-cpp-python"
  )
  parser.add_argument(
    "--gguf", metavar="FILE", type=_file, help="the policy as the GGUF file that it was imported from"
  )


def llama_cpp(options: argparse.Namespace) -> list[Side]:
  """This side, if its interpreter was named."""
  if options.llama_cpp and not options.gguf:
    raise UserError("--llama-cpp: needs --gguf FILE, the model in the format of llama.cpp")
  return (
    [Side("llama_cpp", "benchmarks.llama_peer:Sampling", LLAMA_CPP, options.llama_cpp)] if options.llama_cpp else []
  )


def llama_cpp_work(options: argparse.Namespace) -> dict[str, Any]:
  """What only this side needs to be told."""
  return {"gguf": options.gguf, "gguf_cache": str(options.cache)}


def _program(text: str) -> str:
  if not shutil.which(text):
    raise argparse.ArgumentTypeError(f"there is no program {text!r}")
  return text


def _file(text: str) -> str:
  if not Path(text).is_file():
    raise argparse.ArgumentTypeError(f"there is no file {text!r}")
  return text

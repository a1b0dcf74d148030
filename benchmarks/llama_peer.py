"""llama.cpp through llama-cpp-python: the same weights as a bfloat16 GGUF file, all branches decoded at once.

The prompt is decoded once and its cache copied to the other branches; branches that ended leave the batch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

CHUNK = 512  # prompt tokens decoded at once, and the longest prompt


class Sampling:
  """Useful tokens, as the other sides count them."""

  packages = ("llama-cpp-python",)

  def __init__(self, work: Mapping[str, Any], settings: Mapping[str, Any]):
    self.work, self.batch = work, min(settings["batch"], len(work["prompts"]))
    self.sequences = self.batch * work["responses"]
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    file = _bfloat16(Path(work["gguf"]), Path(work["gguf_cache"]))
    self.model = llama_cpp.llama_load_model_from_file(str(file).encode(), parameters)
    self.context = llama_cpp.llama_new_context_with_model(self.model, self._context_parameters())
    self.memory = llama_cpp.llama_get_memory(self.context)
    self.tokens = llama_cpp.llama_batch_init(max(CHUNK, self.sequences), 0, 1)
    self._sample(work["prompts"][: self.batch], 0, limit=4)

  def run(self, seed: int) -> dict[str, float]:
    """Samples every response once."""
    ordered, lengths = sorted(self.work["prompts"], key=len, reverse=True), []
    for start in range(0, len(ordered), self.batch):
      prompts = ordered[start : start + self.batch]
      lengths += self._sample(prompts, 1000 * seed + start, limit=self.work["max_new_tokens"])
    return {"units": sum(lengths), "responses": len(lengths), "tokens_a_response": float(np.mean(lengths))}

  def _context_parameters(self):
    longest = max(map(len, self.work["prompts"])) + self.work["max_new_tokens"]
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_seq_max = self.sequences
    parameters.n_ctx = self.sequences * (-(-longest // 256) * 256)  # each sequence has its part
    parameters.n_batch = parameters.n_ubatch = max(CHUNK, self.sequences)
    parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
    parameters.kv_unified = False
    return parameters

  def _sample(self, prompts: Sequence[Sequence[int]], seed: int, *, limit: int) -> list[int]:
    """The length of each response; its tokens are not kept."""
    llama_cpp.llama_memory_clear(self.memory, True)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
    stop, count = set(self.work["stop"]), self.work["responses"]
    lengths, growing = np.zeros(len(prompts) * count, int), {}
    for group in _packed(prompts):
      growing |= self._prefill(group, prompts, chain)
    while True:
      for branch in growing:
        lengths[branch] += 1
      growing = {b: token for b, token in growing.items() if token not in stop and lengths[b] < limit}
      if not growing:
        break
      part = [(token, self._length(branch), branch, True) for branch, token in growing.items()]
      self._decode(part)
      growing = {b: llama_cpp.llama_sampler_sample(chain, self.context, row) for row, b in enumerate(growing)}
    llama_cpp.llama_sampler_free(chain)
    return lengths.tolist()

  def _prefill(self, group: Sequence[int], prompts: Sequence[Sequence[int]], chain) -> dict[int, int]:
    """The first token of each branch of some prompts, each of which is decoded once."""
    count, rows, lasts = self.work["responses"], [], {}
    for index in group:
      end = len(prompts[index]) - 1
      rows += [(token, place, index * count, place == end) for place, token in enumerate(prompts[index])]
      lasts[index] = len(rows) - 1
    self._decode(rows)
    first = {}
    for index, last in lasts.items():
      for branch in range(index * count, (index + 1) * count):
        first[branch] = llama_cpp.llama_sampler_sample(chain, self.context, last)
        if branch > index * count:
          llama_cpp.llama_memory_seq_cp(self.memory, index * count, branch, -1, -1)
    return first

  def _length(self, branch: int) -> int:
    return llama_cpp.llama_memory_seq_pos_max(self.memory, branch) + 1

  def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
    """Decodes (token, position, branch, whether its logits are wanted)."""
    batch = self.tokens
    batch.n_tokens = len(rows)
    for index, (token, position, branch, wanted) in enumerate(rows):
      batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
      batch.n_seq_id[index], batch.seq_id[index][0] = 1, branch
    code = llama_cpp.llama_decode(self.context, batch)
    if code:
      raise RuntimeError(f"llama_decode returned {code}")


def _packed(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
  """Indices of prompts that are decoded together."""
  group, tokens = [], 0
  for index, prompt in enumerate(prompts):
    if group and tokens + len(prompt) > CHUNK:
      yield group
      group, tokens = [], 0
    group.append(index)
    tokens += len(prompt)
  yield group


def _bfloat16(source: Path, folder: Path) -> Path:
  """The file with its weights in bfloat16: made once."""
  target = folder / f"{source.stem}.bf16.gguf"
  if not target.is_file():
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    parameters.allow_requantize = True
    parameters.nthread = 0
    folder.mkdir(parents=True, exist_ok=True)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
      raise RuntimeError(f"{source} cannot be converted to bfloat16")
  return target

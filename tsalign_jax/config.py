"""The one configuration of a run: every field, what it means, what is allowed.

A YAML file plus `key=value` overrides become a `Config`; what is wrong becomes one `UserError` that names the key.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tsalign_jax.types import UserError

Dtype = Literal["float32", "bfloat16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Ways = Literal[-1] | Count
LinearMap = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Section(BaseModel):
  """A part of the configuration: immutable, and closed to keys that it does not know."""

  model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
  """A Hugging Face folder, and how it is held and run."""

  path: Path
  """The folder: config.json, safetensors, tokenizer."""
  param_dtype: Dtype = "float32"
  """How parameters are stored; what is trained is float32 while it trains."""
  dtype: Dtype = "bfloat16"
  """How activations and matrix products are computed (sums are always float32)."""
  layout: Literal["auto", "stacked", "unrolled"] = "auto"
  """How layers lie in memory: stacked and scanned (TPU, GPU) or one by one (CPU, encoders)."""
  remat: bool = False
  """Recompute activations in the backward pass: less memory, a third more time."""


class Policy(Model):
  """The language model that is aligned."""


class WarmStart(Section):
  """How the first student is made: from teacher-labelled random pairs of the initial policy's answers."""

  prompts: Count = 64
  """How many training prompts are answered for it; they are not used again."""
  responses: Annotated[int, Field(ge=2)] = 4
  """Answers a prompt."""
  pairs: Count = 4
  """Random pairs a prompt that the teacher labels."""
  epochs: Count = 2
  """Passes over these pairs."""


class Student(Model):
  """The small reward model that scores every response: a decoder or an encoder."""

  max_tokens: Count = 512
  """Longest prompt plus response it reads; longer ones lose the start of the prompt, and are counted."""
  batch_size: Count = 32
  """Prompts (decoder) or sequences (encoder) scored at once."""
  warm_start: WarmStart | None = None
  """Train a first student S(0) on teacher-labelled pairs; null takes the folder's reward head as it is."""


class Prompts(Section):
  """Where prompts come from: a jsonl or parquet file in TRL's prompt-only format, or dataset NAME@SPLIT."""

  train: str
  """Prompts to learn from."""
  heldout: str
  """Prompts to evaluate on, never trained on."""
  max_tokens: Count = 1024
  """Longest prompt in policy tokens, chat template included; longer ones are dropped, counted and listed."""
  per_round: Count | None = None
  """How many training prompts each round takes, in a shuffled order that starts over at its end; null: all."""
  heldout_limit: Count | None = None
  """How many held-out prompts are used: the first so many of the file; null uses all."""


class Sampling(Section):
  """How responses are sampled."""

  responses: int = 8
  """Responses a prompt (K): at least 2."""
  temperature: Positive = 1.0
  """Divides the logits."""
  top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
  """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
  top_k: Annotated[int, Field(ge=0)] = 0
  """Keep this many most likely tokens; 0 keeps all."""
  min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Keep tokens with at least this fraction of the likeliest one's probability."""
  max_new_tokens: Count = 256
  """Longest response in tokens."""
  batch_prompts: Count = 16
  """Prompts in device memory at once."""
  lanes: Count | None = None
  """Responses of one prompt that grow at once; fewer than K waste less on long ones. null: all K."""

  @model_validator(mode="after")
  def _at_least_two(self):
    if self.responses < 2:
      raise ValueError(f"responses is {self.responses}, but a pair needs at least 2 responses a prompt")
    return self


class Mining(Section):
  """Which two responses of a prompt become its candidate pair."""

  strategy: Literal["best_worst", "random"] = "best_worst"
  """The student's best and worst, or two at random (an ablation)."""
  drop_truncated: bool = False
  """Leave out responses that hit the limit of new tokens."""
  min_margin: Annotated[float, Field(ge=0)] = 0.0
  """Least difference in student score between the two; a smaller one makes no candidate."""


class ChecksTeacher(Section):
  """Verifies instructions by program; a score is the fraction satisfied, equal scores are a tie."""

  kind: Literal["checks"] = "checks"
  """Which kind of teacher this is."""
  default: tuple[dict[str, Any], ...] = ()
  """Checks of prompts that bring none of their own: [{name: max_words, limit: 80}, ...]."""
  plugins: tuple[str, ...] = ()
  """Python files or modules that register checks of your own."""


class Optimizer(Section):
  """AdamW with warm-up, clipping and accumulation."""

  learning_rate: Positive = 1e-6
  """Peak learning rate."""
  schedule: Literal["constant", "linear", "cosine"] = "linear"
  """How it falls to 0 after the warm-up, if it does."""
  warmup: Share = 0.1
  """Share of the steps over which it rises from 0."""
  weight_decay: Annotated[float, Field(ge=0)] = 0.0
  """Decoupled weight decay."""
  clip: Positive = 1.0
  """Largest global gradient norm."""
  batch_size: Count = 32
  """Pairs a step."""
  microbatch: Count = 8
  """Pairs in device memory at once; gradients are accumulated exactly over a step's microbatches."""
  epochs: Count = 1
  """Passes over the pairs."""
  checkpoint_every: Count = 100
  """Steps between resumable checkpoints within the stage."""


class LoRA(Section):
  """Low-rank adapters (Hu et al. 2021), merged into the weights at the end of each round."""

  rank: Count = 16
  """Rank of each adapter."""
  alpha: Positive = 32.0
  """Scale: the adapter's output is multiplied by alpha / rank."""
  targets: tuple[LinearMap, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
  """Names of the linear maps that get one."""


class Align(Optimizer):
  """How the policy learns from the pairs: DPO (Rafailov et al. 2023)."""

  beta: Positive = 0.1
  """Strength of the pull towards the reference."""
  label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
  """Assumed share of wrong labels (conservative DPO)."""
  sft_weight: Annotated[float, Field(ge=0)] = 0.0
  """Weight of the chosen response's negative log-likelihood per token."""
  reference: Literal["previous", "initial"] = "previous"
  """The policy that this round started from, or the one the run started from."""
  lora: LoRA | None = None
  """Train adapters instead of all weights."""


class Distil(Optimizer):
  """How the student learns from the teacher's verdicts."""

  loss: Literal["bradley_terry", "margin"] = "bradley_terry"
  """Logistic in the score difference, or hinge at `margin`."""
  margin: Positive = 1.0
  """Score difference the hinge asks for."""
  replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
  """Share of the pairs seen that come from earlier: warm start, earlier rounds and `replay`."""
  replay: str | None = None
  """Human preference pairs to mix in: a jsonl or parquet file in TRL's format, or dataset NAME@SPLIT."""
  epochs: Count = 1
  """Passes over the new pairs."""


class Evaluation(Section):
  """How a policy is compared with the initial one on held-out prompts."""

  samples: Annotated[int, Field(ge=2)] = 2
  """Answers a prompt of each policy; two at least, for the student's held-out pairs."""
  temperature: Positive = 1.0
  """Temperature of these answers."""
  resamples: Count = 2000
  """Bootstrap resamples of the prompts behind the 95% interval."""


class Mesh(Section):
  """Devices along each mesh axis; one of them may be -1: whatever is left."""

  data: Ways = 1
  """Copies of the parameters; batches are split over them."""
  fsdp: Ways = -1
  """Ways in which parameters and batches are split together."""
  tensor: Ways = 1
  """Ways in which heads, hidden units and vocabulary are split."""


class Config(Section):
  """A run of TS-Align."""

  run: Path
  """The run folder: everything the run writes. The same command on the same folder continues."""
  seed: Annotated[int, Field(ge=0)] = 0
  """Everything random is derived from it and from each item's own index."""
  rounds: Count = 2
  """Rounds; a finished run may be continued with more."""
  policy: Policy
  """The language model that is aligned."""
  student: Student
  """The small reward model that scores everything and picks the pairs."""
  teacher: ChecksTeacher = ChecksTeacher()
  """Who decides which of two responses is better."""
  prompts: Prompts
  """What the policy answers."""
  sampling: Sampling = Sampling()
  """How it answers."""
  mining: Mining = Mining()
  """Which two answers the teacher sees."""
  align: Align = Align()
  """How the policy learns from the verdicts."""
  distil: Distil = Distil()
  """How the student learns from the verdicts."""
  evaluation: Evaluation = Evaluation()
  """How the result is measured."""
  mesh: Mesh = Mesh()
  """How devices are arranged."""


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
  """The configuration in a YAML file with `key.subkey=value` overrides; paths are relative to where you are.

  Raises UserError that names the key, what was wrong and what is allowed.
  """
  file = Path(file)
  if not file.is_file():
    raise UserError(f"{file}: there is no such configuration file")
  try:
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
  if not isinstance(content, dict):
    raise UserError(f"{file}: a configuration is a mapping of keys to values, this is a {type(content).__name__}")
  for override in overrides:
    _override(content, override)
  try:
    return Config.model_validate(content)
  except ValidationError as error:
    raise UserError(f"{file}: {_explain(error.errors()[0])}") from error


def dump_config(config: Config) -> str:
  """The configuration as YAML, every field spelled out."""
  return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def changed_keys(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
  """(key, old value, new value) wherever two dumped configurations differ."""
  changes = []
  for key in old | new:
    before, after = old.get(key), new.get(key)
    if isinstance(before, dict) and isinstance(after, dict):
      changes += changed_keys(before, after, f"{prefix}{key}.")
    elif before != after:
      changes.append((f"{prefix}{key}", before, after))
  return changes


def _override(content: dict, override: str) -> None:
  key, equals, value = override.partition("=")
  if not equals:
    raise UserError(f"{override!r}: an override is key=value, such as align.beta=0.2")
  *sections, last = key.split(".")
  for section in sections:
    if content.get(section) is None:
      content[section] = {}
    content = content[section]
    if not isinstance(content, dict):
      raise UserError(f"{key}: {section} is a value, not a section")
  try:
    content[last] = yaml.safe_load(value)
  except yaml.YAMLError as error:
    raise UserError(f"{override!r}: {value!r} is not a YAML value") from error


def _explain(error: dict) -> str:
  """One sentence for pydantic's first complaint."""
  place = [str(part) for part in error["loc"]]
  key = ".".join(place)
  if error["type"] == "extra_forbidden":
    known = _fields_at(place[:-1])
    near = difflib.get_close_matches(place[-1], known, n=1)
    hint = f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known keys are {', '.join(known)}"
    return f"{key}: unknown key; {hint}"
  if error["type"] == "missing":
    return f"{key}: missing; this key is required"
  message = error["msg"].removeprefix("Value error, ")
  return (
    f"{key}: {message[0].lower()}{message[1:]} (got {error['input']!r})"
    if isinstance(error["input"], str | int | float | bool | None)
    else f"{key}: {message}"
  )


def _fields_at(place: list[str]) -> list[str]:
  section: Any = Config
  for part in place:
    annotation = section.model_fields[part].annotation
    options = [option for option in (annotation, *getattr(annotation, "__args__", ())) if isinstance(option, type)]
    section = next(option for option in options if issubclass(option, BaseModel))
  return list(section.model_fields)

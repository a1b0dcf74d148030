"""The one configuration of a run: every field, what it means, what is allowed.

A YAML file plus `key=value` overrides become a `Config`; what is wrong becomes one `UserError` that names the key.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
  BaseModel,
  BeforeValidator,
  ConfigDict,
  Field,
  HttpUrl,
  JsonValue,
  TypeAdapter,
  ValidationError,
  model_validator,
)

from tsalign_jax.nested import walk
from tsalign_jax.types import UserError

Dtype = Literal["float32", "bfloat16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Ways = Literal[-1] | Count
LinearMap = Literal[
  *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # decoders
  *("query", "key", "value", "attention_output", "up", "down"),  # BERT, RoBERTa
  *("attn_qkv", "attn_out", "mlp_in", "mlp_out"),  # ModernBERT
]


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


class RewardModel(Model):
  """A model that scores responses: a decoder or an encoder."""

  max_tokens: Count = 512
  """Longest prompt plus response it reads, if it has so many positions; longer ones lose the start of the prompt."""
  batch_tokens: Count = 4096
  """Tokens scored at once, on all devices together; where one prompt with its responses on each is more, that many."""


class Student(RewardModel):
  """The small reward model that scores every response."""

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
  """How many training prompts each round takes, in a shuffled order that starts over at its end; null, or more: all."""
  heldout_limit: Count | None = None
  """How many held-out prompts are used, taken evenly from the whole file; null uses all."""


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
  def _enough_responses(self):
    if self.responses < 2:
      raise ValueError(f"responses is {self.responses}, but a pair needs at least 2 responses a prompt")
    if self.lanes and self.lanes > self.responses:
      raise ValueError(f"lanes is {self.lanes}, but a prompt has {self.responses} responses; lower it, or drop it")
    return self


class Mining(Section):
  """Which two responses of a prompt become its candidate pair."""

  strategy: Literal["best_worst", "random"] = "best_worst"
  """The student's best and worst, or two at random (an ablation)."""
  drop_truncated: bool = False
  """Leave out responses that hit the limit of new tokens."""
  min_margin: Annotated[float, Field(ge=0)] = 0.0
  """Least difference in student score between the two; a smaller one makes no candidate."""

  @model_validator(mode="after")
  def _margin_of_the_best(self):
    if self.min_margin and self.strategy == "random":
      raise ValueError("min_margin is for strategy best_worst, random pairs are taken as they come; drop one of them")
    return self


class ChecksTeacher(Section):
  """Verifies instructions by program; a score is the fraction satisfied, equal scores are a tie."""

  kind: Literal["checks"] = "checks"
  """Which kind of teacher this is."""
  default: tuple[dict[str, Any], ...] = ()
  """Checks of prompts that bring none of their own: [{name: max_words, limit: 80}, ...]."""
  plugins: tuple[str, ...] = ()
  """Python files or modules that register checks of your own."""

  def sources(self) -> list[str]:
    """Files that the verdicts depend on."""
    return list(self.plugins)


class RewardModelTeacher(RewardModel):
  """A Hugging Face reward model (one label) that scores each response; the higher score wins, equal ones are a tie."""

  kind: Literal["reward_model"] = "reward_model"
  """Which kind of teacher this is."""
  store: Path | None = None
  """SQLite file of scores, to share between runs; null keeps them in the run folder."""

  @model_validator(mode="after")
  def _is_not_trained(self):
    if self.remat:
      raise ValueError("remat is for models that are trained, which a teacher is not; drop it")
    return self

  def sources(self) -> list[str | Path]:
    """What the verdicts depend on: the model's folder."""
    return [self.path]


class Endpoint(Section):
  """A chat server and how it may be used; all of it may change within a run.

  Answers are stored under the model's name and not the server's: where two servers call different models the same, give
  each its own `store`.
  """

  base_url: str
  """Where an OpenAI-compatible server answers: https://api.openai.com/v1, http://localhost:8000/v1."""
  api_key_env: str | None = "OPENAI_API_KEY"
  """Name of the environment variable that holds the key; null for a server that asks for none.

  Fewer than 8 characters are taken for a word that a local server wants to see, and not for a secret.
  """
  concurrency: Count = 16
  """Requests under way at once."""
  timeout: Positive = 120.0
  """Seconds in which an answer must be complete."""
  retries: Annotated[int, Field(ge=0)] = 6
  """Times a question is sent again after a 429, 408 or 5xx, a time-out, or a connection that fails or breaks."""
  backoff: Positive = 1.0
  """Seconds before the first of these; they double each time, less a derived jitter of up to half."""
  max_wait: Positive = 60.0
  """Seconds that backoff may grow to; a question for which the server asks for more (Retry-After) has failed."""
  reasks: Annotated[int, Field(ge=0)] = 2
  """Times a question is asked again when its answer cannot be read: while judging ahead, and as often by `judge`."""
  max_failure_rate: Share = 0.05
  """Share of failed questions above which judging stops, of those sent so far (of 40, while they are fewer)."""
  limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
  """How the server calls the limit of answer tokens; recent OpenAI models want max_completion_tokens."""
  input_price: Annotated[float, Field(ge=0)] = 0.0
  """Price of a million input tokens, in a currency of your choice."""
  output_price: Annotated[float, Field(ge=0)] = 0.0
  """Price of a million output tokens."""
  budget: Positive | None = None
  """Most that this run may spend on this teacher, in that currency; it stops before a request that could exceed it."""

  @model_validator(mode="after")
  def _usable(self):
    # Messages do not repeat the values: what was put in the wrong place may be a secret.
    try:
      address = TypeAdapter(HttpUrl).validate_python(self.base_url)
    except ValidationError as error:
      why = error.errors()[0]["msg"]
      raise ValueError(f"base_url must be a valid address, http:// or https:// and a host ({why})") from None
    if address.username or address.password or address.query:
      raise ValueError("base_url must hold no user, password or query; the key belongs in an environment variable")
    if self.api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", self.api_key_env):
      raise ValueError("api_key_env is the name of an environment variable, in capitals, and never the key itself")
    if self.budget is not None and not (self.input_price or self.output_price):
      raise ValueError("a budget needs prices; set input_price and output_price")
    return self


class ChatTeacher(Section):
  """What teachers behind a chat endpoint have in common."""

  endpoint: Endpoint
  """The server."""
  model: str
  """The model, as the server names it."""
  temperature: Annotated[float, Field(ge=0)] | None = 0.0
  """Sampling temperature; null leaves it to the server."""
  max_tokens: Count = 1024
  """Longest answer in tokens."""
  extra_body: dict[str, JsonValue] = {}
  """Further fields of each request, as this server names them: {reasoning_effort: low}."""
  both_orders: bool = True
  """Ask about each pair in both orders, and call it inconsistent if the answers disagree; or in one that is drawn."""
  store: Path | None = None
  """SQLite file of paid answers, to share between runs; null keeps them in the run folder."""

  @model_validator(mode="after")
  def _no_field_twice(self):
    for field in ("model", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "stream"):
      if field in self.extra_body:
        raise ValueError(f"extra_body must not hold {field!r}, which is set elsewhere or would break the accounting")
    for name, _ in walk(self.extra_body):
      if re.search("(?i)api[-_]?key|secret|password|authorization|access[-_]?token|bearer", str(name)):
        raise ValueError(f"extra_body must not hold {name!r}: a key belongs in an environment variable")
    return self


class JudgeTeacher(ChatTeacher):
  """A language model that is shown two responses and names the better one."""

  kind: Literal["llm_judge"] = "llm_judge"
  """Which kind of teacher this is."""
  template: str = "pairwise"
  """What it is asked: pairwise (one letter), mt_bench (reasons, then a verdict), or a YAML file of your own."""
  verdict: Literal["text", "logprobs"] = "text"
  """Read the letter that it wrote, or compare the log-probabilities that the server gives to A, B and C there."""

  def sources(self) -> list[str]:
    """Files that the verdicts depend on."""
    return [self.template]


class RankerTeacher(ChatTeacher):
  """A language model that orders any number of responses, shown how by examples in its prompt."""

  kind: Literal["ranker"] = "ranker"
  """Which kind of teacher this is."""
  template: str = "ranking"
  """What it is asked: ranking, or a YAML file of your own."""
  demonstrations: str | None = None
  """Examples shown before every question: a jsonl or parquet file of {prompt, responses, ranking: [2, 1, 3]}."""

  def sources(self) -> list[str]:
    """Files that the verdicts depend on."""
    return [self.template, *([self.demonstrations] if self.demonstrations else [])]


SingleTeacher = ChecksTeacher | RewardModelTeacher | JudgeTeacher | RankerTeacher


class EnsembleTeacher(Section):
  """Several teachers that vote on each pair."""

  kind: Literal["ensemble"] = "ensemble"
  """Which kind of teacher this is."""
  members: Annotated[tuple[Annotated[SingleTeacher, Field(discriminator="kind")], ...], Field(min_length=2)]
  """The teachers, each as `teacher` would be."""
  vote: Literal["majority", "mean"] = "majority"
  """The verdict of more than half of the members, or the side of 0.5 on which their mean probability lies."""

  def sources(self) -> list[str | Path]:
    """Files and folders that the verdicts depend on."""
    return [source for member in self.members for source in member.sources()]


def _checks_by_default(teacher: Any) -> Any:
  return {"kind": "checks", **teacher} if isinstance(teacher, dict) else teacher


AnyTeacher = Annotated[SingleTeacher | EnsembleTeacher, Field(discriminator="kind")]
SomeTeacher = Annotated[AnyTeacher, BeforeValidator(_checks_by_default)]


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
  microbatch_tokens: Count = 4096
  """Tokens in device memory at once, on all devices together; a step's gradients are accumulated exactly.

  Each device has at least one row, as long as the longest item.
  """
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
  targets: Annotated[tuple[LinearMap, ...], Field(min_length=1)] | None = None
  """Names of the linear maps that get one, in every layer; null: all that the model has."""


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


class RewardTraining(Optimizer):
  """How a reward model learns from pairs."""

  loss: Literal["bradley_terry", "margin"] = "bradley_terry"
  """Logistic in the score difference, or hinge at `margin`."""
  margin: Positive = 1.0
  """Score difference the hinge asks for."""
  label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
  """Assumed share of pairs that stand the wrong way round."""
  center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0
  """Weight of the squared sum of a pair's scores, which keeps their mean near 0; 0.01 is usual."""
  lora: LoRA | None = None
  """Train adapters and the reward head instead of all weights."""

  @model_validator(mode="after")
  def _margin_of_the_hinge(self):
    if self.loss == "bradley_terry" and self.margin != type(self).model_fields["margin"].default:
      raise ValueError("margin is for loss margin, and bradley_terry takes none but the pairs'; drop it, or set loss")
    return self


class Distil(RewardTraining):
  """How the student learns from the teacher's verdicts."""

  replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
  """Share of the pairs seen that come from earlier: drawn from warm start, earlier rounds and `replay` alike."""
  replay: str | None = None
  """Human preference pairs to mix in: a jsonl or parquet file in TRL's format, or dataset NAME@SPLIT."""
  epochs: Count = 1
  """Passes over the new pairs."""

  @model_validator(mode="after")
  def _replay_is_used(self):
    if self.replay and not self.replay_share:
      raise ValueError("replay would not be used with replay_share 0; raise it, or drop replay")
    return self


class Evaluation(Section):
  """How a policy is compared with the initial one on held-out prompts."""

  samples: Annotated[int, Field(ge=2)] = 2
  """Answers a prompt of each policy; two at least, for the student's held-out pairs."""
  temperature: Positive = 1.0
  """Temperature of these answers."""
  resamples: Count = 2000
  """Bootstrap resamples of the prompts behind the 95% interval."""
  student_prompts: Annotated[int, Field(ge=0)] = 128
  """Held-out prompts on whose answers student and teacher are compared, for up to 6 more verdicts each; 0: none."""
  regret_prompts: Annotated[int, Field(ge=0)] = 64
  """Prompts of a round whose responses a teacher that gives scores sees all, for the student's regret; 0: none."""
  judges: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], SomeTeacher] = {}
  """More judges of the same answers, by name, each written as `teacher` is: nobody learns from what they say."""


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
  teacher: SomeTeacher = ChecksTeacher()
  """Who decides which of two responses is better: checks, reward_model, llm_judge, ranker or ensemble (`kind`)."""
  prompts: Prompts
  """What the policy answers."""
  sampling: Sampling = Sampling()
  """How it answers."""
  mining: Mining = Mining()
  """Which two answers the teacher sees."""
  align: Align = Align()
  """How the policy learns from the verdicts."""
  distil: Distil | None = Distil()
  """How the student learns from the verdicts; null leaves it as it is."""
  evaluation: Evaluation = Evaluation()
  """How the result is measured."""
  mesh: Mesh = Mesh()
  """How devices are arranged."""
  sampling_mesh: Mesh | None = None
  """How they are while the policy samples, if otherwise: without fsdp, no step has to gather the weights."""

  @model_validator(mode="after")
  def _student_is_trained_or_not(self):
    if self.student.warm_start and self.distil is None:
      raise ValueError("student.warm_start needs distil, which says how it trains; set distil, or drop warm_start")
    if self.student.remat and self.distil is None:
      raise ValueError("student.remat is for a student that is trained, and distil is null; drop one of them")
    return self


class Pairs(Section):
  """Preference pairs: jsonl or parquet files in TRL's format, or datasets as NAME@SPLIT."""

  train: Annotated[tuple[str, ...], Field(min_length=1)]
  """Pairs to learn from: a list of sources. Over-long ones, and those whose prompt is held out, are dropped."""
  heldout: str
  """Pairs to measure the accuracy on."""
  margin: str | None = None
  """Column of the training pairs that says by how much the chosen response's score should be ahead; null: none."""


class TrainedModel(RewardModel):
  """The reward model that `tsalign train-reward` trains."""

  chat_template: Path | None = None
  """For a decoder: a Jinja file in place of the folder's chat template, which the trained model keeps."""


class RewardConfig(Section):
  """A training of a reward model, to be a teacher or a student: `tsalign train-reward`."""

  run: Path
  """The run folder: everything the training writes. The same command on the same folder continues."""
  seed: Annotated[int, Field(ge=0)] = 0
  """Everything random is derived from it."""
  model: TrainedModel
  """What is trained: a reward model, or a language model or encoder, which gets a new reward head."""
  pairs: Pairs
  """What it learns from, and is measured on."""
  training: RewardTraining = RewardTraining()
  """How it learns."""
  probe: bool = False
  """First fit a new reward head alone to the pairs (LP-FT, Kumar et al. 2022), as helps where pairs are few."""
  resamples: Count = 2000
  """Bootstrap resamples of the held-out prompts behind the 95% intervals."""
  mesh: Mesh = Mesh()
  """How devices are arranged."""


AnyConfig = TypeVar("AnyConfig", Config, RewardConfig)


def load_config(file: Path, overrides: Sequence[str] = (), schema: type[AnyConfig] = Config) -> AnyConfig:
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
    return schema.model_validate(content)
  except ValidationError as error:
    raise UserError(f"{file}: {_explain(error.errors()[0], schema)}") from error


def dump_config(config: Config | RewardConfig) -> str:
  """The configuration as YAML, every field spelled out."""
  return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
  """(key, old value, new value) wherever two dumped configurations differ."""
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    old, new = dict(enumerate(old)), dict(enumerate(new))
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [(prefix, old, new)] if old != new else []
  changes = []
  for key in sorted(old | new, key=lambda key: key != "kind"):  # another kind has other keys, which say less
    changes += changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
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


def _explain(error: dict, schema: type[BaseModel]) -> str:
  """One sentence for pydantic's first complaint."""
  place, section, kinds = _walk(error["loc"], schema)
  key = ".".join(place)
  if error["type"] == "extra_forbidden":
    known = list(section.model_fields)
    near = difflib.get_close_matches(place[-1], known, n=1)
    hint = f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known keys are {', '.join(known)}"
    return f"{key}: unknown key; {hint}"
  if error["type"] == "union_tag_invalid":
    near = difflib.get_close_matches(error["ctx"]["tag"], kinds, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}.kind: unknown kind {error['ctx']['tag']!r}{hint} (known: {', '.join(kinds)})"
  if error["type"] == "union_tag_not_found":
    return f"{key}.kind: missing; this key is required (known: {', '.join(kinds)})"
  if error["type"] == "missing":
    return f"{key}: missing; this key is required"
  message = error["msg"].removeprefix("Value error, ")
  return (
    f"{key}: {message[0].lower()}{message[1:]} (got {error['input']!r})"
    if isinstance(error["input"], str | int | float | bool | None)
    else f"{key}: {message}"
  )


def _walk(
  place: Sequence[str | int], section: type[BaseModel]
) -> tuple[list[str], type[BaseModel], dict[str, type[BaseModel]]]:
  """The keys of an error's place, the section they lead to, and the kinds to choose from where a kind is wrong.

  Where sections are told apart by their `kind`, pydantic's place names it between the keys:
  (teacher, llm_judge, modle) is the key teacher.modle.
  """
  keys: list[str] = []
  kinds: dict[str, type[BaseModel]] = {}
  for part in place:
    if part in kinds:
      section, kinds = kinds[part], {}
      continue
    keys.append(str(part))
    if isinstance(part, str):
      options = _sections(section.model_fields[part].annotation) if part in section.model_fields else []
      kinds = {each.model_fields["kind"].default: each for each in options if "kind" in each.model_fields}
      section = options[0] if options and not kinds else section
  return keys, section, kinds


def _sections(annotation: Any) -> list[type[BaseModel]]:
  if isinstance(annotation, type) and issubclass(annotation, BaseModel):
    return [annotation]
  return [section for option in get_args(annotation) for section in _sections(option)]

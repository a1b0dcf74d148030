"""The `checks` teacher: a response is as good as the share of its prompt's instructions that it follows.

A prompt row carries `checks: [{"name": "max_words", "limit": 40}, ...]`. A check is a pure function of a
response, registered under a name; its keyword-only arguments are what a row may set:

    @check("max_words")
    def max_words(response: str, *, limit: int) -> bool: ...

Users add their own in a module that the configuration names (`load_plugins`).
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from tsalign_jax.teachers.base import Teacher
from tsalign_jax.types import CandidatePair, Judgement, Prompt, UserError, Verdict

BUILTIN = "tsalign_jax.teachers.builtin_checks"
_ARGUMENT_TYPES = {int: "int", float: "float", str: "str", list[str]: "list[str]"}


@dataclasses.dataclass(frozen=True)
class _Check:
  """A registered check: its function, the arguments that rows may set, and a digest of its source file."""

  function: Callable[..., bool]
  arguments: Mapping[str, inspect.Parameter]
  source: str


_REGISTRY: dict[str, _Check] = {}


def check(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
  """A decorator that registers a function as the check `name` and returns it unchanged.

  Raises UserError if another function has the name, or if an argument is not keyword-only, has no annotation
  among int, float, str and list[str], or is called `name`, which rows use for the name of the check.
  """

  def register(function: Callable[..., bool]) -> Callable[..., bool]:
    taken = _REGISTRY.get(name)
    # The same function defined again is a reloaded module, not a clash.
    if taken and _address(taken.function) != _address(function):
      raise UserError(f"check {name!r} is {_address(taken.function)} and {_address(function)}; rename one")
    _REGISTRY[name] = _Check(function, _settable_arguments(name, function), _source_digest(function))
    return function

  return register


def load_plugins(paths_or_modules: Iterable[str | Path]) -> list[ModuleType]:
  """The modules named by `.py` paths or dotted names, imported so that their checks are registered.

  A module is imported once, however often it is named. Raises UserError for one that does not exist; an
  exception raised inside a plugin passes through.
  """
  return [_import_file(Path(name)) if _is_path(name) else _import_module(name) for name in paths_or_modules]


def validate(checks: Sequence[dict], where: str) -> None:
  """None if every check is known and has the arguments it needs; raises UserError, opening with `where`."""
  if not isinstance(checks, list | tuple):
    raise UserError(f"{where}: checks must be a list, but got {checks!r}")
  for spec in checks:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
      raise UserError(f'{where}: a check looks like {{"name": "max_words", "limit": 40}}, but got {spec!r}')
    if spec["name"] not in _REGISTRY:
      hint, known = _nearest(spec["name"], _REGISTRY), ", ".join(sorted(_REGISTRY))
      raise UserError(f"{where}: unknown check {spec['name']!r}{hint} (known: {known})")
    _validate_arguments(spec, where)


def failed(response: str, checks: Sequence[dict]) -> list[str]:
  """Names of the (valid) checks that the response does not satisfy: all of them if it is blank."""
  return [spec["name"] for spec in checks if not (response.strip() and _passes(response, spec))]


def score(response: str, checks: Sequence[dict]) -> float:
  """Share of the checks that the response satisfies, in [0, 1]; raises UserError if there are none."""
  if not checks:
    raise UserError("a response cannot be scored against no checks; give its prompt at least one")
  return (len(checks) - len(failed(response, checks))) / len(checks)


@dataclasses.dataclass(frozen=True, eq=False)
class ChecksTeacher(Teacher):
  """Prefers the response that satisfies more of its prompt's checks; of `default` where a prompt has none.

  Its identity does not depend on what else was loaded: a check that a plugin borrows from a module outside of it is the
  plugin's only if that module is named beside it.
  """

  default: Sequence[dict] = ()
  plugins: Sequence[str | Path] = ()

  # `checks-` and a digest of the default checks and of names and sources of the built-in checks and the plugins'.
  identity: str = dataclasses.field(init=False)

  def __post_init__(self):
    own = tuple(f"{module.__name__}." for module in load_plugins([BUILTIN, *self.plugins]))
    validate(self.default, "the checks teacher's default checks")
    checks = [(name, each.source) for name, each in _REGISTRY.items() if _address(each.function).startswith(own)]
    digest = _digest(json.dumps([list(self.default), sorted(checks)], sort_keys=True).encode())
    object.__setattr__(self, "identity", f"checks-{digest}")

  def validate_prompts(self, prompts: Iterable[Prompt], source: str = "the prompts") -> None:
    """None if every prompt can be judged, else raises UserError that names the row; to be called up front."""
    for prompt in prompts:
      validate(self.checks_of(prompt, source), f"row {prompt.id + 1} of {source}")

  def checks_of(self, prompt: Prompt, source: str = "the prompts") -> Sequence[dict]:
    """The prompt's own checks, else the default ones; raises UserError if there are neither."""
    if not prompt.checks and not self.default:
      raise UserError(f"row {prompt.id + 1} of {source} has no checks, nor has the checks teacher default ones")
    return prompt.checks or self.default

  def scores(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[float]]:
    """Share of its prompt's checks that each response satisfies."""
    return [[score(response, self.checks_of(prompt)) for response in responses] for prompt, responses in asked]

  def judge(self, pairs: Sequence[CandidatePair]) -> list[Judgement]:
    """One judgement for each pair, in order; equal scores are a TIE. Evidence: scores and failed checks."""
    return [self._judge_pair(pair) for pair in pairs]

  def _judge_pair(self, pair: CandidatePair) -> Judgement:
    checks = self.checks_of(pair.prompt)
    first, second = score(pair.first, checks), score(pair.second, checks)
    evidence = {
      "first": {"score": first, "failed": failed(pair.first, checks)},
      "second": {"score": second, "failed": failed(pair.second, checks)},
    }
    if first == second:
      return Judgement(Verdict.TIE, 0.5, evidence)
    verdict, probability = (Verdict.FIRST, 1.0) if first > second else (Verdict.SECOND, 0.0)
    return Judgement(verdict, probability, evidence)


def _passes(response: str, spec: Mapping) -> bool:
  return bool(_REGISTRY[spec["name"]].function(response, **_arguments(spec)))


def _arguments(spec: Mapping) -> dict:
  # Arrow gives every row of a table the keys of all rows, so an argument of None is one that was not given.
  return {key: value for key, value in spec.items() if key != "name" and value is not None}


def _validate_arguments(spec: Mapping, where: str) -> None:
  given, wanted = _arguments(spec), _REGISTRY[spec["name"]].arguments
  subject = f"{where}: check {spec['name']!r}"
  for key in given:
    if key not in wanted:
      takes = ", ".join(f"{key} ({_type_name(wanted[key])})" for key in wanted) or "no arguments"
      raise UserError(f"{subject} has no argument {key!r}{_nearest(key, wanted)} (it takes {takes})")
  for key, parameter in wanted.items():
    if key not in given and parameter.default is parameter.empty:
      raise UserError(f"{subject} needs the argument {key!r} ({_type_name(parameter)})")
    if key in given and not _is_a(given[key], parameter.annotation):
      raise UserError(f"{subject} wants {key!r} as {_type_name(parameter)}, but got {given[key]!r}")


def _is_a(value: object, kind: type) -> bool:
  if kind == list[str]:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
  if isinstance(value, bool):  # Python counts True as an int; the author of a row does not
    return False
  return isinstance(value, int | float if kind is float else kind)


def _nearest(word: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(word, known, n=1)
  return f"; did you mean {close[0]!r}?" if close else ""


def _type_name(parameter: inspect.Parameter) -> str:
  return _ARGUMENT_TYPES[parameter.annotation]


def _settable_arguments(name: str, function: Callable[..., bool]) -> dict[str, inspect.Parameter]:
  _, *rest = inspect.signature(function, eval_str=True).parameters.values()
  for parameter in rest:
    known_type = parameter.annotation in list(_ARGUMENT_TYPES)
    if parameter.kind is not parameter.KEYWORD_ONLY or not known_type or parameter.name == "name":
      allowed = ", ".join(_ARGUMENT_TYPES.values())
      raise UserError(
        f"check {name!r}: argument {parameter.name!r} must be keyword-only, annotated as one of {allowed}, "
        "and not be called 'name'"
      )
  return {parameter.name: parameter for parameter in rest}


def _address(function: Callable) -> str:
  return f"{function.__module__}.{function.__qualname__}"


def _source_digest(function: Callable) -> str:
  """Digest of the whole file, as a check may rest on helpers there; of the bytecode if there is no file."""
  file = Path(function.__code__.co_filename)
  return _digest(file.read_bytes() if file.is_file() else function.__code__.co_code)


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def _is_path(name: str | Path) -> bool:
  return isinstance(name, Path) or name.endswith(".py") or "/" in name


def _import_file(path: Path) -> ModuleType:
  if not path.is_file():
    raise UserError(f"plugin {str(path)!r} is not a file; name a .py file or an importable module")
  name = f"tsalign_plugin_{path.stem}_{_digest(str(path.resolve()).encode())}"
  if name in sys.modules:
    return sys.modules[name]
  spec = importlib.util.spec_from_file_location(name, path)
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]  # half a module must not pass for a loaded one the next time
    raise
  return module


def _import_module(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if not f"{name}.".startswith(f"{error.name}."):
      raise  # the plugin exists, but something that it imports does not
    raise UserError(f"plugin {name!r} cannot be imported; name a .py file or an importable module") from error


# The built-in checks are the first plugin. They come last because they import the decorator above.
load_plugins([BUILTIN])

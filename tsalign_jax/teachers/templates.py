"""Prompt templates for language models as teachers: YAML files of chat messages, each written in Jinja."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tsalign_jax.types import Conversation, UserError

_FOLDER = Path(__file__).parent / "prompts"
_ROLES = ("system", "user", "assistant")
_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@dataclasses.dataclass(frozen=True)
class Template:
  """Messages to fill in, how a reply to them is read (`letter`, `mark` or `ranking`), and a digest of the file."""

  answer: str
  messages: tuple[tuple[str, jinja2.Template], ...]
  digest: str

  def fill(self, **values: Any) -> Conversation:
    """The messages with these values."""
    return [{"role": role, "content": content.render(values).strip()} for role, content in self.messages]


def load_template(name: str, where: str, *, answers: Collection[str], sample: Mapping[str, Any]) -> Template:
  """The built-in template of this name, or that in a YAML file; `sample` holds an example of what it is filled with.

  Raises UserError, opening with the configuration key `where`, if there is none, if it reads replies in another way
  than `answers`, if it leaves out one of the values, uses other ones or cannot be filled with these.
  """
  file = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
  if not file.is_file():
    known = ", ".join(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
    raise UserError(f"{where}: there is no template {name!r}; give a .yaml file, or one of {known}")
  content = file.read_bytes()
  try:
    found = yaml.safe_load(content)
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise UserError(f"{where}: {file} is not valid YAML: {' '.join(str(error).split())}") from error
  _check_form(found, f"{where}: {file}")
  if found["answer"] not in [*answers]:  # it may be anything
    raise UserError(f"{where}: {file} has answer {found['answer']!r}, but this teacher reads {' or '.join(answers)}")
  messages, used = [], set()
  for message in found["messages"]:
    try:
      used |= meta.find_undeclared_variables(_JINJA.parse(message["content"]))
      messages.append((message["role"], _JINJA.from_string(message["content"])))
    except jinja2.TemplateSyntaxError as error:
      raise UserError(f"{where}: {file} is not a valid template: {error.message} (line {error.lineno})") from error
  _check_variables(used, sample, f"{where}: {file}")
  template = Template(found["answer"], tuple(messages), hashlib.sha256(content).hexdigest()[:16])
  try:
    template.fill(**sample)
  except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise UserError(f"{where}: {file} cannot be filled in: {error}") from error
  return template


def _check_form(found: Any, where: str) -> None:
  if not isinstance(found, dict) or set(found) != {"answer", "messages"}:
    raise UserError(f"{where}: a template has the keys answer and messages; copy a built-in one as a start")
  messages = found["messages"]
  for message in messages if isinstance(messages, list) and messages else [messages]:
    valid = isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
    if not valid:
      raise UserError(f"{where}: messages is a list of {{role: {' | '.join(_ROLES)}, content: text}}, not {message!r}")


def _check_variables(used: set[str], given: Collection[str], where: str) -> None:
  for name in given:
    if name not in used:
      raise UserError(f"{where}: does not show {{{{ {name} }}}}; put it into a message")
  for name in sorted(used - set(given)):
    raise UserError(f"{where}: uses {name!r}, but all it is given is {', '.join(given)}")

"""One request to an OpenAI-compatible chat endpoint: a reply, or what went wrong."""

import asyncio
import dataclasses
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import openai
import pydantic

from tsalign_jax.config import Endpoint
from tsalign_jax.teachers.backoff import retry_after
from tsalign_jax.teachers.ledger import Outcome
from tsalign_jax.teachers.parse import Token
from tsalign_jax.types import UserError

SECRET_LENGTH = 8  # a shorter key is a word like EMPTY, that a local server wants to see
LONGEST_MESSAGE = 300
GATEWAY_TIMED_OUT = (504, 524)  # the server behind it may go on, and charge
UNCONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")  # of the HTTP library, whichever the client brings


@dataclasses.dataclass(frozen=True)
class Clock:
  """Where time comes from; tests bring their own."""

  now: Callable[[], float] = time.time
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclasses.dataclass(frozen=True)
class Reply:
  """A complete reply of the server. Counts and log-probabilities are there if the server gave them."""

  text: str
  finish: str | None
  tokens: Sequence[Token] | None
  input_tokens: int | None
  output_tokens: int | None
  model: str | None


@dataclasses.dataclass(frozen=True)
class Trouble:
  """A request without a reply: what became of it, in words too, and the seconds that the server asked to wait."""

  outcome: Outcome
  message: str
  wait: float | None = None


class ChatClient:
  """Sends requests to one endpoint. It alone knows the key, and takes it out of whatever the server says."""

  def __init__(self, endpoint: Endpoint, where: str, clock: Clock):
    self._endpoint, self._clock = endpoint, clock
    self._key = _key(endpoint, where)
    self._client: openai.AsyncOpenAI | None = None

  async def send(self, body: dict[str, Any]) -> Reply | Trouble:
    """The server's reply to a request, tried once. MALFORMED is a reply that is not a chat completion."""
    if self._client is None:  # made here, as it belongs to the event loop that it is used on
      self._client = openai.AsyncOpenAI(
        base_url=self._endpoint.base_url, api_key=self._key, timeout=self._patience(), max_retries=0
      )
      self._client.chat  # noqa: B018  imported as it is looked at: not in the time that a request may take
    try:
      # The client's own time-out is for each read, and a server that drips a byte at a time never exceeds it.
      async with asyncio.timeout(self._endpoint.timeout):
        response = await self._client.chat.completions.with_raw_response.create(**body)
    except TimeoutError:
      return self._late()
    except openai.APIConnectionError as error:
      if type(error.__cause__).__name__ in UNCONNECTED:
        return Trouble(Outcome.UNREACHED, self._clean(f"no connection ({error.__cause__})"))
      if isinstance(error, openai.APITimeoutError):
        return self._late()
      return Trouble(Outcome.DROPPED, self._clean(f"connection failed ({error.__cause__ or error})"))
    except openai.APIStatusError as error:
      return self._status(error)
    try:
      return self._reply(_Completion.model_validate_json(response.http_response.content))
    except pydantic.ValidationError as error:
      first = error.errors()[0]
      return Trouble(Outcome.MALFORMED, f"not a chat completion ({'.'.join(map(str, first['loc']))} {first['msg']})")

  def key_is_in(self, text: str) -> bool:
    """Whether the key stands somewhere in this text."""
    return self._without_key(text) != text

  async def close(self) -> None:
    """Closes connections."""
    if self._client is not None:
      await self._client.close()
      self._client = None

  def _patience(self) -> openai.Timeout:
    """Of connecting, less than of all: whoever was never reached is not to be counted among those who may charge."""
    whole = self._endpoint.timeout
    return openai.Timeout(whole, connect=whole / 2)

  def _late(self) -> Trouble:
    return Trouble(Outcome.TIMED_OUT, f"no complete answer within {self._endpoint.timeout:g} s")

  def _status(self, error: openai.APIStatusError) -> Trouble:
    message = self._clean(f"{error.status_code}: {_words(error.body)}")
    if error.status_code == 429:
      outcome = Outcome.RATE_LIMITED
    elif error.status_code in (408, *GATEWAY_TIMED_OUT):
      outcome = Outcome.TIMED_OUT
    elif error.status_code >= 500:
      outcome = Outcome.SERVER_ERROR
    else:
      return Trouble(Outcome.REFUSED, message)
    return Trouble(outcome, message, retry_after(error.response.headers, self._clock.now()))

  def _reply(self, completion: "_Completion") -> Reply:
    choice, usage = completion.choices[0], completion.usage
    tokens = None
    if choice.logprobs and choice.logprobs.content:
      tokens = [
        Token(self._without_key(token.token), [(each.token, each.logprob) for each in token.top_logprobs or []])
        for token in choice.logprobs.content
      ]
    return Reply(
      text=self._without_key(choice.message.content or ""),
      finish=choice.finish_reason,
      tokens=tokens,
      input_tokens=usage.prompt_tokens if usage else None,
      output_tokens=usage.completion_tokens if usage else None,
      model=self._without_key(completion.model) if completion.model else None,
    )

  def _clean(self, message: str) -> str:
    """A server's message as part of one line of ours."""
    return " ".join(self._without_key(message).split())[:LONGEST_MESSAGE]

  def _without_key(self, text: str) -> str:
    return text.replace(self._key, "[key]") if len(self._key) >= SECRET_LENGTH else text


def _words(body: object) -> str:
  """What a server says of an error: its message where it follows OpenAI's form or FastAPI's, else all of it."""
  said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
  return str(said or body or "no message")


def _key(endpoint: Endpoint, where: str) -> str:
  name = endpoint.api_key_env
  if name is None:
    return "none"  # the client insists on one
  key = os.environ.get(name, "").strip()
  if not key:
    raise UserError(
      f"{where}.endpoint.api_key_env: the environment variable {name} is not set; export it, or say null for a server "
      "that asks for no key"
    )
  if not re.fullmatch("[!-~]+", key):
    # The client would quote such a key in its error, and otherwise than it is written.
    raise UserError(
      f"{where}.endpoint.api_key_env: the environment variable {name} holds a space, a line break or another character "
      "that no key has; set it to the key alone"
    )
  return key


def _if_readable(value: Any, read: pydantic.ValidatorFunctionWrapHandler) -> Any:
  """None for what cannot be read: an answer is not lost because of what stands beside it."""
  try:
    return read(value)
  except pydantic.ValidationError:
    return None


IfReadable = pydantic.WrapValidator(_if_readable)


class _Message(pydantic.BaseModel):
  content: str | None = None


class _Alternative(pydantic.BaseModel):
  token: str
  logprob: float = pydantic.Field(lt=1.0)  # it may be rounded to a little more than 0


class _Token(_Alternative):
  top_logprobs: list[_Alternative] | None = None


class _Logprobs(pydantic.BaseModel):
  content: list[_Token] | None = None


class _Choice(pydantic.BaseModel):
  message: _Message
  finish_reason: str | None = None
  logprobs: Annotated[_Logprobs | None, IfReadable] = None


class _Usage(pydantic.BaseModel):
  prompt_tokens: int = pydantic.Field(ge=0)
  completion_tokens: int = pydantic.Field(ge=0)


class _Completion(pydantic.BaseModel):
  """What is read of a chat completion; the rest of it is nobody's business here."""

  choices: list[_Choice] = pydantic.Field(min_length=1)
  usage: Annotated[_Usage | None, IfReadable] = None
  model: Annotated[str | None, IfReadable] = None

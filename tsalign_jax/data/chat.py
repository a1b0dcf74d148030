"""Conversations to tokens and back, through the model's own tokenizer and chat template."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tsalign_jax.types import Conversation, UserError

TURNS = ({"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"})


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer with its chat template and the tokens that end a response."""

  tokenizer: PreTrainedTokenizerBase
  stop_tokens: tuple[int, ...]

  @classmethod
  def load(cls, folder: Path, template: Path | None = None) -> "Chat":
    """The chat of a Hugging Face folder, by a template of its own or by that in a file.

    Raises UserError without a tokenizer, template or end token.
    """
    tokenizer = load_tokenizer(folder)
    if template:
      tokenizer.chat_template = _read_template(template, tokenizer)
    if not tokenizer.chat_template:
      raise UserError(
        f"{folder}: its tokenizer has no chat template; use an instruction-tuned model, or put the template of one "
        "into chat_template.jinja"
      )
    stop = _stop_tokens(Path(folder), tokenizer)
    if not stop:
      raise UserError(f"{folder}: neither its configuration nor its tokenizer names an end-of-sequence token")
    return cls(tokenizer, stop)

  def prompt_tokens(self, messages: Conversation) -> list[int]:
    """The conversation as the model reads it, up to where its answer begins, with exactly one BOS if it wants one.

    >>> chat.prompt_tokens([{"role": "user", "content": "Hi"}])   # <|im_start|>user Hi <|im_end|> <|im_start|>assistant
    """
    return self._tokens(self.text_of(messages, answer_follows=True))

  def conversation_tokens(self, messages: Conversation) -> list[int]:
    """A conversation up to the end of its last turn, whatever the template writes there: what a reward model reads.

    >>> chat.conversation_tokens([user, answer])   # <|im_start|>user Hi <|im_end|> <|im_start|>assistant Yes <|im_end|>
    """
    return self._tokens(self.text_of(messages, answer_follows=False))

  def text_of(self, messages: Conversation, *, answer_follows: bool) -> str:
    """The conversation as the template writes it. Raises UserError where the template refuses it."""
    try:
      return self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer_follows, tokenize=False)
    except TemplateError as error:  # such as a system turn, where a model knows none
      start = messages[0]["content"][:60]
      raise UserError(f"the chat template refuses the prompt that begins {start!r}: {error}") from error

  def check(self, prompts: Iterable[tuple[int, Conversation]], source: str, reader: str) -> None:
    """Raises UserError that names the first (row, prompt) of a source which the template refuses to `reader`."""
    for row, messages in prompts:
      try:
        self.text_of(messages, answer_follows=True)
        self.text_of([*messages, TURNS[1]], answer_follows=False)
      except UserError as error:
        raise UserError(f"{source}: row {row}, read by {reader}: {error}") from error

  def response_tokens(self, response: str) -> list[int]:
    """Tokens of a response that the model did not sample, with the token that ends a turn."""
    return [*self.tokenizer.encode(response, add_special_tokens=False), self.stop_tokens[0]]

  def text(self, tokens: Sequence[int]) -> str:
    """What a person reads: without special tokens and surrounding space."""
    return self.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

  def _tokens(self, text: str) -> list[int]:
    """The tokens of a templated text, which brings its own special tokens."""
    tokens = self.tokenizer.encode(text, add_special_tokens=False)
    bos = self.tokenizer.bos_token_id
    if bos is None:
      return tokens
    wanted = self.tokenizer.encode("a")[:1] == [bos] or tokens[:1] == [bos]
    body = tokens
    while body[:1] == [bos]:
      body = body[1:]
    tokens = [bos, *body] if wanted else body
    assert (tokens[:1] == [bos]) == wanted and tokens[1:2] != [bos], "a prompt starts with exactly one BOS"
    return tokens


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a Hugging Face folder; UserError when there is none."""
  folder = Path(folder)
  if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
    raise UserError(f"{folder}: no tokenizer.json or tokenizer_config.json there")
  return AutoTokenizer.from_pretrained(folder)


def _read_template(file: Path, tokenizer) -> str:
  if not file.is_file():
    raise UserError(f"{file}: there is no such chat template")
  template = file.read_text(encoding="utf-8")
  try:
    text = tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False)
  except TemplateError as error:
    raise UserError(f"{file}: not a chat template ({error})") from error
  if not all(turn["content"] in text for turn in TURNS):
    raise UserError(f"{file}: the template leaves out what is said; it has to write every message's content")
  return template


def _turn_end(tokenizer) -> int | None:
  """The special token that the chat template writes after an answer, such as Gemma's <end_of_turn>."""
  answer = TURNS[-1]["content"]
  whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
  tail = tokenizer.encode(whole[whole.rindex(answer) + len(answer) :], add_special_tokens=False)
  return next((token for token in tail if token in tokenizer.all_special_ids), None)


def _stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
  """End tokens, the one that ends a chat turn first: of the tokenizer, the generation config and the config."""
  found = [_turn_end(tokenizer), tokenizer.eos_token_id]
  for file in ("generation_config.json", "config.json"):
    if (folder / file).is_file():
      value = json.loads((folder / file).read_text()).get("eos_token_id")
      found += value if isinstance(value, list) else [value]
  return tuple(dict.fromkeys(token for token in found if token is not None))

"""Chat templates, BOS and end tokens."""

import json

import pytest
import tiny

from tsalign_jax.data.chat import Chat
from tsalign_jax.types import UserError

HELLO = [{"role": "user", "content": "tell a cat"}]


def chat_of(folder, **kwargs):
  tiny.decoder("llama", folder)
  tiny.tokenizer(folder, **kwargs)
  return Chat.load(folder)


def test_prompt_ends_where_the_answer_begins(tmp_path):
  chat = chat_of(tmp_path)
  words = chat.tokenizer.convert_ids_to_tokens(chat.prompt_tokens(HELLO))
  assert words == ["<s>", "<user>", "tell", "a", "cat", "<end>", "<assistant>"]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_at_most_one_bos_whatever_the_template_writes(bos, tmp_path):
  chat = chat_of(tmp_path, template=tiny.TEMPLATE.replace("{{ bos_token }}", bos))
  tokens = chat.prompt_tokens(HELLO)
  assert tokens.count(chat.tokenizer.bos_token_id) == (1 if bos else 0)
  assert tokens[int(bool(bos))] != chat.tokenizer.bos_token_id


def test_response_of_a_file_ends_with_the_end_token(tmp_path):
  chat = chat_of(tmp_path)
  assert chat.tokenizer.convert_ids_to_tokens(chat.response_tokens("the dog")) == ["the", "dog", "<end>"]


def test_the_token_that_ends_a_turn_comes_from_the_template(tmp_path):
  """As with Gemma, whose end-of-sequence token is not what ends an answer."""
  chat = chat_of(tmp_path, template=tiny.TEMPLATE.replace("<end>", "<system>"))
  turn, end = chat.tokenizer.convert_tokens_to_ids(["<system>", "<end>"])
  assert chat.stop_tokens == (turn, end)
  assert chat.response_tokens("the dog")[-1] == turn


def test_end_tokens_come_from_every_place_that_names_them(tmp_path):
  chat_of(tmp_path)
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
  assert Chat.load(tmp_path).stop_tokens == (2, 9)


def test_text_has_no_special_tokens(tmp_path):
  chat = chat_of(tmp_path)
  assert chat.text(chat.response_tokens("the dog")) == "the dog"


def test_folder_without_tokenizer_is_refused(tmp_path):
  tiny.decoder("llama", tmp_path)
  with pytest.raises(UserError, match=r"no tokenizer.json or tokenizer_config.json"):
    Chat.load(tmp_path)

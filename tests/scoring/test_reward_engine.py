"""Reward models from text to score, against transformers reading the same folder."""

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers

from tsalign_jax.config import Student
from tsalign_jax.models.loading import reward_model
from tsalign_jax.scoring.reward import Alike, Encoded, build_reward_engine, conversation_text

TOLERANCE = 1e-4
ASKED = [
  ([{"role": "user", "content": "tell a cat"}], ["the dog", "a big red fish eat the small bird in the rain", ""]),
  ([{"role": "user", "content": "write of rain with snow in 3"}], ["rain , snow"]),
  (
    [
      {"role": "system", "content": "be warm"},
      {"role": "user", "content": "list two"},
      {"role": "assistant", "content": "sun and sea"},
      {"role": "user", "content": "one more ?"},
    ],
    ["sun and sea and tree", "sun and sea and tree", "door"],
  ),
]
PAIRS = [(prompt, response) for prompt, responses in ASKED for response in responses]


def scores_of(folder, mesh, **settings) -> list[float]:
  """Our score of every pair, from batches of prompts."""
  settings = Student(path=folder, **{"dtype": "float32", "batch_tokens": 200, "max_tokens": 100} | settings)
  model = reward_model(settings)
  engine = build_reward_engine(model, mesh, settings)
  found = dict(engine.score(model.load(mesh), [engine.encode(*each) for each in ASKED]))
  return [score for index in range(len(ASKED)) for score in found[index]]


def conversations(tokenizer) -> list[list[int]]:
  """The tokens of every pair, as transformers makes them of messages."""
  answered = [[*prompt, {"role": "assistant", "content": response}] for prompt, response in PAIRS]
  return [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in answered]


def decoder_folder(folder, family, *, template=tiny.TEMPLATE, pad="<pad>"):
  """A reward model with its tokenizer, both of which pad with this token; returns both as PyTorch knows them."""
  tiny.decoder(family, folder, reward=True)
  tiny.tokenizer(folder, template=template)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tokenizer.pad_token = pad
  tokenizer.save_pretrained(folder)
  tiny.change_json(folder / "config.json", pad_token_id=tokenizer.pad_token_id)
  peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
  return peer.eval(), tokenizer


@torch.inference_mode()
def alone(peer, rows) -> list[float]:
  """Each row by itself, read at its very last token: without a padding token, transformers looks for none."""
  peer.config.pad_token_id = None
  return [peer(torch.tensor([row])).logits.item() for row in rows]


@torch.inference_mode()
def padded(peer, tokenizer, rows, side: str) -> list[float]:
  """All rows in one batch."""
  tokenizer.padding_side = side
  batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
  return peer(**batch).logits[:, 0].tolist()


# As most templates, which write a line break or the like after the token that ends a turn; and as some do not.
ENDINGS = {"after the end": tiny.TEMPLATE + "{% if not add_generation_prompt %}.{% endif %}", "the end": tiny.TEMPLATE}


@pytest.mark.parametrize("pad", ["<pad>", "<end>"], ids=["pad", "pad = eos"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("family", tiny.REWARD)
def test_decoder_scores_equal_transformers(family, ending, pad, tmp_path, one_device):
  peer, tokenizer = decoder_folder(tmp_path, family, template=ENDINGS[ending], pad=pad)
  ours, rows = scores_of(tmp_path, one_device), conversations(tokenizer)
  assert tokenizer.eos_token_id == 2 and {row[-1] for row in rows} == {2 if ending == "the end" else rows[0][-1]}
  if pad != "<end>" or ending != "the end":  # else transformers takes the end of the text for padding
    for side in ("left", "right"):
      np.testing.assert_allclose(ours, padded(peer, tokenizer, rows, side), atol=TOLERANCE)
  np.testing.assert_allclose(ours, alone(peer, rows), atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_encoder_scores_equal_transformers(family, side, tmp_path, one_device):
  """Whichever side the tokenizer pads; transformers reads scores at the first column, so that it has to pad right."""
  peer = tiny.encoder(family, tmp_path, reward=True)
  tiny.bert_tokenizer(tmp_path, pad=peer.config.pad_token_id)
  tiny.change_json(tmp_path / "tokenizer_config.json", padding_side=side)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert tokenizer.padding_side == side
  tokenizer.padding_side = "right"
  texts = [(conversation_text(prompt), response) for prompt, response in PAIRS]
  keys = ["input_ids", "attention_mask"] + ["token_type_ids"] * (peer.config.model_type == "bert")
  with torch.inference_mode():
    batch = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    together = peer(**{key: batch[key] for key in keys}).logits[:, 0].tolist()
    rows = [tokenizer([one], [other], return_tensors="pt") for one, other in texts]
    single = [peer(**{key: row[key] for key in keys}).logits.item() for row in rows]
  ours = scores_of(tmp_path, one_device)
  np.testing.assert_allclose(ours, together, atol=TOLERANCE)
  np.testing.assert_allclose(ours, single, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_sharded_scores_equal_single_device(family, tmp_path, one_device, eight_devices):
  if family == "bert":
    tiny.encoder(family, tmp_path, reward=True)
    tiny.bert_tokenizer(tmp_path)
  else:
    decoder_folder(tmp_path, family)
  np.testing.assert_allclose(scores_of(tmp_path, eight_devices), scores_of(tmp_path, one_device), atol=TOLERANCE)


def test_conversation_has_its_own_tokens_also_where_the_template_writes_an_answer_otherwise(tmp_path, one_device):
  """As Qwen 3, which asks for thoughts and writes an answer without."""
  template = tiny.TEMPLATE.replace("'<assistant> '", "'<assistant> say '")
  peer, tokenizer = decoder_folder(tmp_path, "qwen3", template=template)
  np.testing.assert_allclose(scores_of(tmp_path, one_device), alone(peer, conversations(tokenizer)), atol=TOLERANCE)


def test_long_conversation_loses_the_start_of_its_prompt_and_is_counted(tmp_path, one_device):
  _, tokenizer = decoder_folder(tmp_path, "llama")
  settings = Student(path=tmp_path, dtype="float32", max_tokens=9)
  engine = build_reward_engine(reward_model(settings), one_device, settings)
  prompt, response = ASKED[0][0], "the dog"
  (whole,) = ([*prompt, {"role": "assistant", "content": response}],)
  tokens = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
  item = engine.encode(prompt, [response])
  assert len(tokens) == 10 and item.prompt + item.responses[0] == tokens[1:] and item.cut == [True]
  item, short = engine.encode(prompt, [response, "the"]), engine.encode(prompt, ["the"])
  assert item.cut == [True, False] and short.cut == [False]
  assert [item.prompt + each for each in item.responses] == [tokens[1:], short.prompt + short.responses[0]]


@pytest.mark.parametrize("behind", ["", " tell ? take"])
def test_long_response_loses_its_end_but_not_what_the_template_writes_behind_it(behind, tmp_path, one_device):
  """Where the reward is read."""
  template = tiny.TEMPLATE + "{% if not add_generation_prompt %}" + behind + "{% endif %}"
  _, tokenizer = decoder_folder(tmp_path, "llama", template=template)
  settings = Student(path=tmp_path, dtype="float32", max_tokens=9)
  engine = build_reward_engine(reward_model(settings), one_device, settings)
  prompt, response = ASKED[0][0], "the dog and the cat and the bird and the fish and the tree"
  item = engine.encode(prompt, [response])
  (tokens,) = item.responses
  written = tokenizer.decode(tokens)
  assert len(tokens) == 9 and item.prompt == [] and item.cut == [True]
  assert written.endswith("<end>" + behind) and "the dog and" in written


def test_scores_of_a_bfloat16_model_are_not_rounded_to_it(tmp_path, one_device):
  decoder_folder(tmp_path, "llama")
  scores = np.asarray(scores_of(tmp_path, one_device, dtype="bfloat16"), np.float32)
  assert (scores != scores.astype(ml_dtypes.bfloat16).astype(np.float32)).any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_pairs_laid_out_together_have_the_scores_that_each_has_alone(family, tmp_path, one_device):
  if family == "bert":
    tiny.encoder(family, tmp_path, reward=True)
    tiny.bert_tokenizer(tmp_path)
  else:
    decoder_folder(tmp_path, family)
  settings = Student(path=tmp_path, dtype="float32", max_tokens=100)
  model = reward_model(settings)
  engine, params = build_reward_engine(model, one_device, settings), model.load(one_device)
  items = [
    engine.encode(prompt, [responses[0], " ".join(tiny.WORDS[n : 2 * n + 1])])
    for n, (prompt, responses) in enumerate(6 * ASKED)
  ]
  alone = [np.asarray(engine.program(params, engine.collate([item], engine.steps)))[0] for item in items]
  chosen, found = [*range(0, 18, 2), 5], {}
  shapes = set()
  for batch, place in engine.lay_out(items, len(chosen), 512).batches(chosen):
    rewards = np.asarray(engine.program(params, batch))
    assert rewards.shape == (*place.shape, 2) and np.isfinite(rewards).all()
    shapes.add(place.shape)
    for where in np.argwhere(place >= 0):
      found[int(place[tuple(where)])] = rewards[tuple(where)]
  assert sorted(found) == sorted(chosen) and len(shapes) <= 2
  for index, rewards in found.items():
    np.testing.assert_allclose(rewards, alone[index], atol=TOLERANCE)


def test_pairs_of_any_lengths_need_few_programs(tmp_path, one_device):
  decoder_folder(tmp_path, "llama")
  settings = Student(path=tmp_path, dtype="float32", batch_tokens=512, max_tokens=100)
  model = reward_model(settings)
  engine, params = build_reward_engine(model, one_device, settings), model.load(one_device)
  shapes, program = set(), engine.program
  engine.program = lambda params, batch: shapes.add(batch.tokens.shape) or program(params, batch)
  for calls in range(4):
    items = [
      engine.encode(
        [{"role": "user", "content": " ".join(tiny.WORDS[: n + calls])}],
        [tiny.WORDS[n], " ".join(tiny.WORDS[n : 2 * n])],
      )
      for n in range(1, 40, 1 + calls)
    ]
    assert sorted(index for index, _ in engine.score(params, items)) == list(range(len(items)))
  assert len(shapes) <= 4  # two for each of the layouts that these four sets of lengths have


def test_many_responses_of_different_lengths_need_few_programs_and_little_padding(tmp_path, one_device):
  """Eight to a prompt, of which the longest would decide for all; where lengths are alike, prompts are read once."""
  decoder_folder(tmp_path, "llama")
  settings = Student(path=tmp_path, dtype="float32", batch_tokens=1024, max_tokens=400)
  model = reward_model(settings)
  engine, params = build_reward_engine(model, one_device, settings), model.load(one_device)
  random = np.random.default_rng(0)

  def items(lengths):
    return [
      engine.encode(
        [{"role": "user", "content": " ".join(random.choice(tiny.WORDS, random.integers(4, 30)))}],
        [" ".join(random.choice(tiny.WORDS, lengths())) for _ in range(8)],
      )
      for _ in range(12)
    ]

  ragged = items(lambda: int(random.lognormal(3, 0.8)) + 1)
  batches = list(engine._batches([unit for *_, unit in engine._units(ragged)]))
  read = sum(len(item.prompt) + sum(map(len, item.responses)) for item in ragged)
  assert len({batch.tokens.shape for batch, _ in batches}) <= 2
  assert sum(batch.tokens.size for batch, _ in batches) < 1.6 * read
  found, alone = dict(engine.score(params, ragged)), np.zeros((12, 8))
  for n, item in enumerate(ragged):
    for k, response in enumerate(item.responses):
      single = item._replace(responses=[response], cut=[False])
      alone[n, k] = dict(engine.score(params, [single]))[0][0]
  np.testing.assert_allclose([found[n] for n in range(12)], alone, atol=TOLERANCE)

  even = items(lambda: 60)
  assert all(list(responses) == list(range(8)) for _, responses, _ in engine._units(even))
  found = dict(engine.score(params, even))
  for n, item in enumerate(even):
    for k, response in enumerate(item.responses):
      single = item._replace(responses=[response], cut=[False])
      alone[n, k] = dict(engine.score(params, [single]))[0][0]
  np.testing.assert_allclose([found[n] for n in range(12)], alone, atol=TOLERANCE)


def test_batches_hold_no_more_tokens_than_they_may(tmp_path, one_device):
  decoder_folder(tmp_path, "llama")
  settings = Student(path=tmp_path, max_tokens=1200)
  engine = build_reward_engine(reward_model(settings), one_device, settings)
  shapes = [(1024, 128), (16, 256), (1024, 128), (1024, 120), (500, 30), (30, 100)]  # tokens of prompt and response
  items = [Encoded([1] * prompt, [[1] * response] * 8, [], [False] * 8) for prompt, response in shapes]
  batches = list(Alike(engine, items, len(items), 8192, engine.steps).batches(range(len(items))))
  assert sorted(place for _, places in batches for place in places if place >= 0) == [*range(len(items))]
  assert all(batch.trunk.size + batch.branches.size <= 8192 for batch, _ in batches)


@pytest.mark.parametrize(("prompts", "batch_tokens"), [(64, 4096), (512, 16384)])
def test_responses_of_widely_different_lengths_need_few_programs(prompts, batch_tokens, tmp_path, one_device):
  """Half of them capped, all of some length, or anything in between: a program has work for several batches."""
  decoder_folder(tmp_path, "llama")
  settings = Student(path=tmp_path, dtype="float32", batch_tokens=batch_tokens)
  engine, random = build_reward_engine(reward_model(settings), one_device, settings), np.random.default_rng(0)
  some = {
    "ragged": lambda: min(512, 2 + int(random.lognormal(5, 0.7))),
    "capped": lambda: 512 if random.random() < 0.5 else min(512, 2 + int(random.lognormal(5, 0.7))),
    "alike": lambda: int(random.integers(80, 110)),
  }
  for kind, length in some.items():
    lengths = [(min(512, 2 + int(random.lognormal(5, 0.6))), [length() for _ in range(8)]) for _ in range(prompts)]
    items = [Encoded([5] * prompt, [[6] * each for each in rows], [], [False] * 8) for prompt, rows in lengths]
    units = [unit for *_, unit in engine._units(items)]
    batches = [batch for batch, _ in engine._batches(units)]
    shapes = {tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}
    assert len(shapes) <= max(8, len(batches) // 3), kind
    if kind == "ragged":
      padded = sum(batch.tokens.size for batch in batches)
      assert len(shapes) <= 2 and padded < 1.6 * sum(prompt + sum(rows) for prompt, rows in lengths)

"""`tsalign train-reward`: what it learns, writes, drops, refuses and continues."""

import json
import random
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import killed
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers
import yaml
from refused import expect_error
from rich.console import Console
from safetensors.numpy import load_file
from stages import judging

from tsalign_jax.config import RewardConfig, Student, load_config
from tsalign_jax.data.files import read_preferences
from tsalign_jax.models.hf import save_params
from tsalign_jax.models.loading import reward_model
from tsalign_jax.progress import terminal_progress
from tsalign_jax.report.reward import reward_summary
from tsalign_jax.scoring.reward import build_reward_engine, conversation_text
from tsalign_jax.stages.train_reward import usable_pairs
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.train_reward import train_reward
from tsalign_jax.types import CandidatePair, Prompt, UserError, Verdict

QUIET = terminal_progress(Console(quiet=True))
ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "tsalign_jax.cli", "train-reward"]


def preference(number: int) -> dict:
  """Whoever wrote this data likes the sun and not the rain; either may be the longer one."""
  draw = random.Random(number)
  words = [draw.choices(tiny.WORDS[18:60], k=draw.randint(2, 9)) for _ in range(3)]
  for side, word in ((1, "sun"), (2, "rain")):
    kept = [other for other in words[side] if other not in ("sun", "rain")]
    words[side] = [*kept, word, word]
  prompt, chosen, rejected = map(" ".join, words)
  return {"prompt": f"write {prompt}", "chosen": chosen, "rejected": rejected, "strength": number % 3}


def write_rows(file, rows) -> str:
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(file)


def config_file(folder, family="llama", **training):
  """A tiny training, with files of pairs of which some are of no use."""
  model = folder / "model"
  if family in tiny.ENCODERS:
    tiny.encoder(family, model)
    tiny.bert_tokenizer(model, pad=1 if family == "roberta" else 0)
  else:
    tiny.decoder(family, model)
    tiny.tokenizer(model)
  held = [preference(number) for number in range(1000, 1032)]
  leaked = {**held[3], "chosen": "the sun"}
  equal = {**preference(77), "rejected": preference(77)["chosen"]}
  long = {**preference(78), "prompt": " ".join(tiny.WORDS) + " the cat"}
  first = write_rows(folder / "first.jsonl", [*map(preference, range(40)), leaked, equal, long])
  second = write_rows(folder / "second.jsonl", map(preference, range(40, 64)))
  held[4] = held[4] | {"rejected": held[4]["chosen"]}
  held[5] = held[5] | {"prompt": " ".join(tiny.WORDS)}
  settings = {"learning_rate": 3e-3, "batch_size": 8, "microbatch_tokens": 512, "epochs": 3, "checkpoint_every": 4}
  config = {
    "run": str(folder / "run"),
    "model": {"path": str(model), "dtype": "float32", "max_tokens": 60, "batch_tokens": 512},
    "pairs": {"train": [first, second], "heldout": write_rows(folder / "held.jsonl", held)},
    "training": settings | training,
    "resamples": 200,
  }
  file = folder / "config.yaml"
  file.write_text(yaml.safe_dump(config))
  return file


def metrics_of(run) -> dict:
  metrics = json.loads((run / "metrics.json").read_text())
  assert metrics.pop("seconds").keys() == {"train", "evaluate"}
  return metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
  """An undisturbed training of a decoder in a process of its own, and what it printed."""
  folder = tmp_path_factory.mktemp("trained")
  config = config_file(folder)
  result = subprocess.run([*COMMAND, config], check=True, env=environment | {"COLUMNS": "200"}, capture_output=True)
  return folder, config, result.stdout.decode()


def test_it_learns_what_the_pairs_show(trained):
  folder, _, printed = trained
  metrics = metrics_of(folder / "run")
  assert metrics["train_pairs"] == 64 and metrics["steps"] == 24
  assert metrics["accuracy"] > 0.9 > metrics["longer_wins"] and metrics["loss"] < 0.5 and metrics["margin"] > 0.5
  assert metrics["accuracy_ci"][0] <= metrics["accuracy"] <= metrics["accuracy_ci"][1]
  assert metrics["accuracy_ci"][0] > metrics["longer_wins_ci"][1]
  log = [json.loads(line) for line in (folder / "run" / "train.jsonl").read_text().splitlines()]
  assert len(log) == 24 and log[-1]["loss"] < log[0]["loss"]
  words = " ".join(printed.split())
  low, high = metrics["accuracy_ci"]
  assert f"reward model {metrics['accuracy']:.1%} {low:.1%} to {high:.1%}" in words and "longer wins" in words
  assert f"Model: {folder / 'run' / 'model'}" in words


def test_the_margin_column_reaches_the_examples_that_are_learned_from(tmp_path, one_device):
  config = load_config(config_file(tmp_path), ["pairs.margin=strength"], RewardConfig)
  engine = build_reward_engine(reward_model(config.model), one_device, config.model)
  examples, _ = usable_pairs(engine, config)
  assert [example.margin for example in examples] == [number % 3 for number in range(64)]


def test_pairs_that_are_dropped_or_cut_are_counted_and_said(trained):
  folder, _, printed = trained
  metrics = metrics_of(folder / "run")
  dropped = {"chosen and rejected are equal": 1, "longer than 60 tokens": 1, "the prompt is held out": 1}
  assert metrics["dropped"] == dropped
  assert (metrics["heldout_pairs"], metrics["heldout_cut"], metrics["heldout_equal"]) == (31, 1, 1)
  words = " ".join(printed.split())
  for reason, count in dropped.items():
    assert f"Dropped: {count} ({reason})." in words
  assert "did not read everything: 1." in words and "left out: 1." in words and "31 held-out pairs" in words


def test_metrics_follow_from_the_scores_of_the_held_out_pairs(trained):
  folder, _, _ = trained
  metrics, rows = metrics_of(folder / "run"), pq.read_table(folder / "run" / "heldout.parquet").to_pylist()
  pairs = read_preferences(str(folder / "held.jsonl"))
  assert [row["row"] for row in rows] == [number for number in range(32) if number != 4]
  margins = np.asarray([row["chosen_score"] - row["rejected_score"] for row in rows])
  lengths = np.asarray([len(pairs[row["row"]].chosen) - len(pairs[row["row"]].rejected) for row in rows])
  assert metrics["accuracy"] == pytest.approx(np.mean(np.where(margins == 0, 0.5, margins > 0)))
  assert metrics["longer_wins"] == pytest.approx(np.mean(np.where(lengths == 0, 0.5, lengths > 0)))
  assert metrics["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-6)


@torch.inference_mode()
def theirs(folder, pairs) -> np.ndarray:
  """transformers' scores of chosen and rejected, all in one batch."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
  if tokenizer.chat_template:
    answered = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in texts]
    batch = tokenizer.apply_chat_template(answered, padding=True, return_dict=True, return_tensors="pt")
  else:
    sides = [conversation_text(prompt) for prompt, _ in texts], [text for _, text in texts]
    batch = tokenizer(*sides, padding=True, return_tensors="pt")
  return model(**batch).logits.reshape(-1, 2).numpy()


def ours(run, pairs) -> np.ndarray:
  rows = pq.read_table(run / "heldout.parquet").to_pylist()
  return np.asarray([[row["chosen_score"], row["rejected_score"]] for row in rows if not row["cut"]])


def test_transformers_loads_the_model_and_scores_alike(trained):
  folder, _, _ = trained
  pairs = [pair for n, pair in enumerate(read_preferences(str(folder / "held.jsonl"))) if n not in (4, 5)]
  scores = ours(folder / "run", pairs)
  np.testing.assert_allclose(scores, theirs(folder / "run" / "model", pairs), atol=1e-4)
  assert np.abs(scores).max() > 0.3


def test_the_model_serves_as_teacher_and_as_student(trained, tmp_path):
  folder, _, _ = trained
  path = folder / "run" / "model"
  assert not reward_model(Student(path=path)).fresh_head
  pairs = read_preferences(str(folder / "held.jsonl"))[6:]
  asked = [CandidatePair(Prompt(n, pair.prompt), pair.rejected, pair.chosen) for n, pair in enumerate(pairs)]
  config = judging.config_file(tmp_path, {"kind": "reward_model", "path": str(path), "dtype": "float32"})
  with build_teacher(load_config(config)) as teacher:
    judged = teacher.judge(asked)
  chosen, rejected = ours(folder / "run", pairs)[4:].T
  margins = [judgement.evidence["margin"] for judgement in judged]
  np.testing.assert_allclose(margins, rejected - chosen, atol=1e-4)
  assert sum(judgement.verdict == Verdict.SECOND for judgement in judged) > 0.9 * len(judged)


def test_killed_and_continued_training_equals_an_undisturbed_one(trained, environment, tmp_path):
  folder, config, _ = trained
  arguments = ["train-reward", config, f"run={tmp_path / 'run'}"]
  for amount in (3, 11):  # steps, before and after a checkpoint
    command = [sys.executable, killed.__file__, "train", str(amount), *arguments]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
  assert not (tmp_path / "run" / "model").exists()
  subprocess.run([*COMMAND, *arguments[1:]], check=True, env=environment, stdout=subprocess.DEVNULL)
  assert metrics_of(tmp_path / "run") == metrics_of(folder / "run")
  for file in ("train.jsonl", "model/model.safetensors"):
    assert (tmp_path / "run" / file).read_bytes() == (folder / "run" / file).read_bytes()
  assert not list((tmp_path / "run").glob("*.partial")) and not list((tmp_path / "run").glob("*.out"))


def test_a_changed_configuration_or_file_is_refused(trained, tmp_path):
  folder, config, _ = trained
  shutil.copytree(folder / "run", tmp_path / "run")
  overrides = [f"run={tmp_path / 'run'}"]
  with pytest.raises(UserError, match=r"training.epochs: this run folder was made with 3, the config"):
    train_reward(load_config(config, [*overrides, "training.epochs=4"], RewardConfig), QUIET)
  copy = write_rows(tmp_path / "held.jsonl", map(preference, range(1000, 1010)))
  (tmp_path / "run" / "config.yaml").write_text(
    (tmp_path / "run" / "config.yaml").read_text().replace(str(folder / "held.jsonl"), copy)
  )
  with pytest.raises(UserError, match=r"held.jsonl: changed since stage train read it"):
    train_reward(load_config(config, [*overrides, f"pairs.heldout={copy}"], RewardConfig), QUIET)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoder_learns_over_eight_devices_with_everything_that_the_loss_offers(family, tmp_path):
  extra = {"lora": {"rank": 4}} if family == "modernbert" else {}
  config = config_file(
    tmp_path, family, label_smoothing=0.05, center_rewards_coefficient=0.01, learning_rate=1e-2, **extra
  )
  settings = load_config(config, ["pairs.margin=strength", "mesh.fsdp=4", "mesh.tensor=2"], RewardConfig)
  train_reward(settings, QUIET)
  metrics = metrics_of(tmp_path / "run")
  assert metrics["accuracy"] > 0.9
  pairs = [pair for n, pair in enumerate(read_preferences(str(tmp_path / "held.jsonl"))) if n not in (4, 5)]
  np.testing.assert_allclose(ours(tmp_path / "run", pairs), theirs(tmp_path / "run" / "model", pairs), atol=1e-4)
  names = set(load_file(tmp_path / "run" / "model" / "model.safetensors"))
  assert not any("lora" in name for name in names)


@pytest.mark.parametrize("pad", [None, "<end>", "<pad>"])
def test_written_decoder_pads_with_a_token_that_ends_no_conversation(pad, tmp_path, one_device):
  """With the token that ends a turn, transformers would take the end of the text for padding."""
  tiny.decoder("llama", tmp_path / "source", reward=True)
  tiny.tokenizer(tmp_path / "source")
  for file, value in (("config.json", {None: None, "<end>": 2, "<pad>": 0}[pad]), ("tokenizer_config.json", pad)):
    key = "pad_token_id" if file == "config.json" else "pad_token"
    content = json.loads((tmp_path / "source" / file).read_text()) | {key: value}
    (tmp_path / "source" / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
  settings = Student(path=tmp_path / "source", dtype="float32", max_tokens=100)
  model = reward_model(settings)
  params = model.load(one_device)
  save_params(params, model.skeleton, model.config, model.folder, tmp_path / "out", dtype=np.float32)
  pairs = [
    pair._replace(prompt=[{"role": "user", "content": pair.prompt[0]["content"]}])
    for pair in read_preferences(write_rows(tmp_path / "pairs.jsonl", map(preference, range(5))))
  ]
  peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "source").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  peer.config.pad_token_id = None
  texts = [[*p.prompt, {"role": "assistant", "content": t}] for p in pairs for t in (p.chosen, p.rejected)]
  rows = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in texts]
  with torch.inference_mode():
    alone = [peer(torch.tensor([row])).logits.item() for row in rows]
  np.testing.assert_allclose(theirs(tmp_path / "out", pairs).ravel(), alone, atol=1e-4)


def test_a_template_of_its_own_is_learned_with_and_written_with_the_model(tmp_path):
  """One that asks something after each conversation, and ends with a token that was the padding before."""
  asking = tiny.TEMPLATE + "{% if not add_generation_prompt %}<user>what is it<pad>{% endif %}"
  (tmp_path / "asking.jinja").write_text(asking)
  overrides = [f"model.chat_template={tmp_path / 'asking.jinja'}", "training.epochs=1", "probe=true"]
  train_reward(load_config(config_file(tmp_path), overrides, RewardConfig), QUIET)
  assert 0 < metrics_of(tmp_path / "run")["probe_accuracy"] <= 1
  model = tmp_path / "run" / "model"
  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  assert tokenizer.chat_template == asking and tokenizer.pad_token != "<pad>"
  pairs = [pair for n, pair in enumerate(read_preferences(str(tmp_path / "held.jsonl"))) if n not in (4, 5)]
  scores = ours(tmp_path / "run", pairs)
  np.testing.assert_allclose(scores, theirs(model, pairs), atol=1e-4)
  config = judging.config_file(tmp_path, {"kind": "reward_model", "path": str(model), "dtype": "float32"})
  asked = [CandidatePair(Prompt(n, pair.prompt), pair.chosen, pair.rejected) for n, pair in enumerate(pairs)]
  with build_teacher(load_config(config)) as teacher:
    margins = [judgement.evidence["margin"] for judgement in teacher.judge(asked)]
  np.testing.assert_allclose(margins, scores[:, 0] - scores[:, 1], atol=1e-4)


def test_an_encoder_has_no_use_for_a_template(tmp_path):
  (tmp_path / "asking.jinja").write_text(tiny.TEMPLATE)
  config = load_config(
    config_file(tmp_path, "bert"), [f"model.chat_template={tmp_path / 'asking.jinja'}"], RewardConfig
  )
  with pytest.raises(UserError, match=r"asking.jinja: a bert reads pairs of texts, by no chat template; leave it out"):
    train_reward(config, QUIET)


def test_a_head_that_is_there_is_not_thrown_away(tmp_path):
  config = config_file(tmp_path)
  tiny.decoder("llama", tmp_path / "model", reward=True)
  with pytest.raises(UserError, match=r"probe: .*model has a reward head already, which a new one would replace"):
    train_reward(load_config(config, ["probe=true"], RewardConfig), QUIET)


def test_nothing_left_to_learn_from_is_said(tmp_path):
  config = config_file(tmp_path)
  settings = load_config(config, ["model.max_tokens=5"], RewardConfig)
  with pytest.raises(UserError, match=r"pairs.train: no pair is left to learn from .*longer than 5 tokens: 65"):
    train_reward(settings, QUIET)


def test_held_out_pairs_that_could_not_be_measured_are_refused_before_training(tmp_path):
  config, held = config_file(tmp_path), tmp_path / "held.jsonl"
  rows = [json.loads(line) for line in held.read_text().splitlines()]
  template = tmp_path / "no_system.jinja"
  template.write_text(
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.TEMPLATE
  )
  said = [{"role": role, "content": "the sun"} for role in ("system", "user")]
  write_rows(held, [*rows[:6], rows[6] | {"prompt": said}])
  with pytest.raises(UserError, match=r"held.jsonl: row 7, read by the model: the chat template refuses .* 'the sun'"):
    train_reward(load_config(config, [f"model.chat_template={template}"], RewardConfig), QUIET)
  write_rows(held, [rows[4]] * 3)
  with pytest.raises(UserError, match=r"held.jsonl: chosen and rejected are equal in every row"):
    train_reward(load_config(config, [], RewardConfig), QUIET)


WRONG = {
  "misspelt key": (["training.learning_rat=1"], ["training.learning_rat: unknown key; did you mean training.learning"]),
  "no sources": (["pairs.train=[]"], ["pairs.train", "at least 1 item"]),
  "no such file": (["pairs.heldout=nowhere.jsonl"], ["nowhere.jsonl: there is no such file"]),
  "no such model": (["model.path=nowhere"], ["nowhere: no config.json there"]),
  "no such template": (["model.chat_template=nowhere.jinja"], ["nowhere.jinja: there is no such chat template"]),
  "no template": ([f"model.chat_template={ROOT / 'LICENSE'}"], ["LICENSE: the template leaves out what is said"]),
  "broken template": (
    [f"model.chat_template={ROOT / 'tsalign_jax/report/report.html.jinja'}"],
    ["report.html.jinja: not a chat template ("],
  ),
  "no such margin": (["pairs.margin=votes"], ["first.jsonl: row 1: no `votes`, which was to be its margin"]),
  "too much smoothing": (["training.label_smoothing=0.5"], ["training.label_smoothing", "less than 0.5"]),
  "negative centring": (["training.center_rewards_coefficient=-1"], ["center_rewards_coefficient", "0", "-1"]),
  "no such map": (["training.lora.targets=[query]"], ["training.lora.targets: a llama has no query; it has q_proj"]),
}


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
  return config_file(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_one_sentence_before_any_device_is_touched(case, tiny_config, tsalign):
  overrides, parts = WRONG[case]
  expect_error(tsalign("train-reward", tiny_config, *overrides), *parts)


def test_summary_says_nothing_of_what_did_not_happen(tmp_path):
  metrics = {"heldout_pairs": 1000, "accuracy": 0.625, "accuracy_ci": [0.6, 0.65], "train_pairs": 2000}
  metrics |= {"longer_wins": 0.5, "longer_wins_ci": [0.47, 0.53], "dropped": {}, "heldout_cut": 0, "heldout_equal": 0}
  (tmp_path / "metrics.json").write_text(json.dumps(metrics))
  console = Console(width=80, file=StringIO(), color_system=None)
  console.print(reward_summary(tmp_path))
  printed = console.file.getvalue()
  assert "1,000 held-out pairs" in printed and "62.5%" in printed and "60.0% to 65.0%" in printed
  assert "Trained on 2,000 pairs." in printed and "ropped" not in printed and "left out" not in printed

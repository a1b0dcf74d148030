"""The reward_model teacher: transformers' scores of the same text, each computed once and kept."""

import dataclasses
import json
import math
import shutil
import sqlite3

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file
from stages import judging
from teachers.asked import rows

from tsalign_jax.config import Mesh, load_config
from tsalign_jax.config import RewardModelTeacher as Settings
from tsalign_jax.scoring.reward import conversation_text
from tsalign_jax.teachers import reward_model
from tsalign_jax.teachers.build import build_teacher
from tsalign_jax.teachers.reward_model import RewardModelTeacher
from tsalign_jax.teachers.store import scored
from tsalign_jax.types import CandidatePair, Prompt, UserError, Verdict

TOLERANCE = 1e-4
TEXTS = ["the dog", "a big red fish eat the small bird in the rain", "snow", "warm light , and cold", ""]
PAIRS = [
  CandidatePair(Prompt(n, [{"role": "user", "content": f"tell of {tiny.WORDS[20 + n]}"}]), first, second)
  for n in range(3)
  for first, second in ((TEXTS[n], TEXTS[n + 1]), (TEXTS[n + 2], TEXTS[n]), (TEXTS[n], TEXTS[n]))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A decoder and an encoder that score."""
  decoder, encoder = tmp_path_factory.mktemp("decoder"), tmp_path_factory.mktemp("encoder")
  tiny.decoder("qwen3", decoder, reward=True)
  tiny.tokenizer(decoder)
  tiny.encoder("bert", encoder, reward=True)
  tiny.bert_tokenizer(encoder)
  return {"decoder": decoder, "encoder": encoder}


def teacher_of(folder, run, **changes):
  settings = {"kind": "reward_model", "path": str(folder), "dtype": "float32", "max_tokens": 100, "batch_tokens": 800}
  return build_teacher(load_config(judging.config_file(run, settings | changes)))


@torch.inference_mode()
def score(folder, pair, text) -> float:
  """What transformers says of one response."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  if tokenizer.chat_template:
    messages = [*pair.prompt.messages, {"role": "assistant", "content": text}]
    inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
  else:
    inputs = tokenizer([conversation_text(pair.prompt.messages)], [text], return_tensors="pt")
  return model(**inputs).logits.item()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_verdict_margin_and_probability_follow_from_the_scores_of_transformers(kind, folders, tmp_path):
  with teacher_of(folders[kind], tmp_path) as teacher:
    judged = teacher.judge(PAIRS)
    assert teacher.note() == "9 responses scored"
  verdicts = set()
  for pair, judgement in zip(PAIRS, judged, strict=True):
    first, second = (score(folders[kind], pair, text) for text in (pair.first, pair.second))
    assert judgement.evidence["first"]["score"] == pytest.approx(first, abs=TOLERANCE)
    assert judgement.evidence["second"]["score"] == pytest.approx(second, abs=TOLERANCE)
    assert judgement.evidence["margin"] == pytest.approx(first - second, abs=TOLERANCE)
    assert judgement.probability == pytest.approx(1 / (1 + math.exp(second - first)), abs=TOLERANCE)
    equal = pair.first == pair.second
    assert judgement.verdict == (Verdict.TIE if equal else Verdict.FIRST if first > second else Verdict.SECOND)
    verdicts.add(judgement.verdict)
  assert len(verdicts) == 3


def test_scores_are_what_the_verdicts_rest_on(folders, tmp_path):
  with teacher_of(folders["decoder"], tmp_path) as teacher:
    judged = teacher.judge(PAIRS)
    found = teacher.scores([(pair.prompt, [pair.second, pair.first]) for pair in PAIRS])
  evidence = [[judgement.evidence[side]["score"] for side in ("second", "first")] for judgement in judged]
  assert found == evidence


def test_probability_of_a_hopeless_pair_is_a_number():
  low, high = (reward_model.Score(value, 1, False, 0.0) for value in (-900.0, 900.0))
  assert reward_model.compare(low, high).probability == 0 and reward_model.compare(high, low).probability == 1


def test_every_response_is_scored_once_in_a_run(folders, tmp_path, monkeypatch):
  asked = []
  compute = reward_model.RewardModelTeacher._compute
  monkeypatch.setattr(
    reward_model.RewardModelTeacher, "_compute", lambda self, missing: asked.extend(missing) or compute(self, missing)
  )
  with teacher_of(folders["decoder"], tmp_path) as teacher:
    first = teacher.judge(PAIRS[:4])
  with teacher_of(folders["decoder"], tmp_path) as teacher:
    assert teacher.judge(PAIRS[:4]) == first
    judged = teacher.judge(PAIRS)
    assert judged[:4] == first
  distinct = {(json.dumps(pair.prompt.messages), text) for pair in PAIRS for text in (pair.first, pair.second)}
  assert len(asked) == len(distinct) == 9
  (total,) = scored(tmp_path / "run" / "verdicts.sqlite")
  assert (total.teacher, total.responses, total.cut) == (teacher.identity, 9, 0) and total.seconds > 0
  lengths = rows(tmp_path / "run" / "verdicts.sqlite", "SELECT total(tokens) FROM scores")[0][0]
  prompt = ["<s>", "<user>", "tell", "of", "x", "<end>", "<assistant>"]
  assert lengths == total.tokens == sum(len(prompt) + len(text.split()) + 1 for _, text in distinct)


def test_a_batch_is_stored_whole_or_not_at_all(folders, tmp_path, monkeypatch):
  """So that a run that was killed scores the same responses together again, and gets the same last digits."""
  half = [reward_model.Score(1.0 if n < 3 else None, 2, False, 0.0) for n in range(9)]
  monkeypatch.setattr(reward_model.RewardModelTeacher, "_compute", lambda self, missing: half)
  with teacher_of(folders["encoder"], tmp_path) as teacher, pytest.raises(sqlite3.IntegrityError):
    teacher.judge(PAIRS)
  with teacher_of(folders["encoder"], tmp_path) as teacher:
    assert teacher.note() == "0 responses scored"


def test_score_of_a_cut_conversation_does_not_depend_on_its_sibling(folders, tmp_path):
  prompt = Prompt(0, [{"role": "user", "content": " ".join(tiny.WORDS[:30])}])
  short, long = "the dog", " ".join(tiny.WORDS[30:44])
  scores = {}
  for name, second in (("together", long), ("alone", short)):
    (tmp_path / name).mkdir()
    with teacher_of(folders["decoder"], tmp_path / name, max_tokens=24) as teacher:
      (judgement,) = teacher.judge([CandidatePair(prompt, short, second)])
      scores[name] = judgement.evidence["first"]
      assert teacher.note().endswith("cut to 24 tokens")
  assert scores["together"]["cut"] is True
  assert scores["together"]["score"] == pytest.approx(scores["alone"]["score"], abs=1e-6)


def test_identity_follows_what_scores_depend_on_and_not_where_the_folder_is(folders, tmp_path):
  def identity(folder, **changes):
    return teacher_of(folder, tmp_path, **changes).identity

  original = folders["decoder"]
  name = identity(original)
  copy = shutil.copytree(original, tmp_path / "elsewhere" / original.name)
  assert identity(copy) == name == identity(copy, batch_tokens=300)
  assert len({name, identity(copy, max_tokens=50), identity(copy, dtype="bfloat16")}) == 3
  tensors = load_file(copy / "model.safetensors")
  save_file(tensors | {"score.weight": -tensors["score.weight"]}, copy / "model.safetensors", {"format": "pt"})
  assert identity(copy) != name


def test_folder_without_a_reward_head_is_refused(tmp_path):
  tiny.decoder("llama", tmp_path / "model")
  tiny.tokenizer(tmp_path / "model")
  with pytest.raises(UserError, match=r"teacher.path: .*model has no reward head; `tsalign train-reward` trains one"):
    teacher_of(tmp_path / "model", tmp_path)


def test_prompt_that_the_chat_template_refuses_is_named_by_its_row(folders, tmp_path):
  copy = shutil.copytree(folders["decoder"], tmp_path / "model")
  refusing = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.TEMPLATE
  )
  tiny.tokenizer(copy, template=refusing)
  turns = [{"role": "system", "content": "be warm"}, {"role": "user", "content": "tell"}]
  prompts = [Prompt(0, turns[1:]), Prompt(1, turns)]
  with pytest.raises(UserError, match=r"prompts.jsonl: row 2, read by teacher: .*'be warm': no system turn"):
    teacher_of(copy, tmp_path).validate_prompts(prompts, "prompts.jsonl")
  teacher_of(folders["decoder"], tmp_path).validate_prompts(prompts, "prompts.jsonl")
  judge = RewardModelTeacher(Settings(path=copy), tmp_path, "evaluation.judges.gold", Mesh())
  with pytest.raises(UserError, match=r"row 2, read by evaluation.judges.gold: "):
    judge.validate_prompts(prompts, "prompts.jsonl")


def test_scores_that_are_no_numbers_stop_the_run(folders, tmp_path):
  copy = shutil.copytree(folders["decoder"], tmp_path / "model")
  tensors = load_file(copy / "model.safetensors")
  broken = np.full_like(tensors["score.weight"], np.inf)
  save_file(tensors | {"score.weight": broken}, copy / "model.safetensors", {"format": "pt"})
  with teacher_of(copy, tmp_path) as teacher, pytest.raises(UserError, match="its scores are not finite"):
    teacher.judge(PAIRS[:1])


def test_ensemble_of_two_reward_models_votes_on_their_probabilities(folders, tmp_path):
  members = [{"kind": "reward_model", "path": str(folder), "dtype": "float32"} for folder in folders.values()]
  config = load_config(judging.config_file(tmp_path, {"kind": "ensemble", "members": members, "vote": "mean"}))
  with build_teacher(config) as teacher:
    judged = teacher.judge(PAIRS)
  for pair, judgement in zip(PAIRS, judged, strict=True):
    chances = []
    for folder in folders.values():
      margin = score(folder, pair, pair.first) - score(folder, pair, pair.second)
      chances.append(1 / (1 + math.exp(-margin)))
    assert judgement.probability == pytest.approx(np.mean(chances), abs=TOLERANCE)
    assert [member["teacher"].split()[0] for member in judgement.evidence["members"]] == ["reward_model"] * 2
  assert len(scored(tmp_path / "run" / "verdicts.sqlite")) == 2


def test_stage_judges_and_a_changed_model_is_refused(folders, tmp_path):
  copy = shutil.copytree(folders["encoder"], tmp_path / "model")
  asked = [dataclasses.replace(pair, prompt=pair.prompt._replace(id=n)) for n, pair in enumerate(PAIRS)]
  judging.write_inputs(tmp_path / "inputs", asked)
  config = load_config(judging.config_file(tmp_path, {"kind": "reward_model", "path": str(copy), "dtype": "float32"}))
  judging.run(config)
  judging.run(config)
  tiny.change_json(copy / "config.json", layer_norm_eps=1e-5)
  with pytest.raises(UserError, match=r"teacher: this run began with 'reward_model model \w+', which now is"):
    judging.run(config)

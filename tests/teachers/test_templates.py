"""Prompt templates: what they show, and that a wrong one is named before anything is asked."""

import pytest

from tsalign_jax.teachers.llm_judge import FORMATS, SAMPLE
from tsalign_jax.teachers.ranker import SAMPLE as RANKING_SAMPLE
from tsalign_jax.teachers.templates import load_template
from tsalign_jax.types import UserError

TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Tea?"},
  {"role": "assistant", "content": "Green?"},
  {"role": "user", "content": "{{ Black }} & <strong>"},
]


def load(name):
  return load_template(str(name), "teacher.template", answers=FORMATS, sample=SAMPLE)


@pytest.mark.parametrize("name", ["pairwise", "mt_bench"])
def test_judge_sees_the_whole_conversation_and_each_response_once(name):
  messages = load(name).fill(prompt=TALK, first="Response {{ one }}", second="Response two")
  assert [message["role"] for message in messages] == ["system", "user"]
  shown = messages[1]["content"]
  for text in ("Be brief.", "Tea?", "Green?", "{{ Black }} & <strong>", "Response {{ one }}", "Response two"):
    assert shown.count(text) == 1
  assert shown.index("Tea?") < shown.index("Green?") < shown.index("one }}") < shown.index("two")


def test_ranker_sees_demonstrations_before_what_it_is_to_rank():
  template = load_template("ranking", "teacher.template", answers=["ranking"], sample=RANKING_SAMPLE)
  example = {"prompt": TALK[1:2], "responses": ["x1", "x2", "x3"], "ranking": [3, 1, 2]}
  shown = template.fill(prompt=TALK, responses=["y1", "y2"], demonstrations=[example])[1]["content"]
  assert "Ranking: [3] > [1] > [2]" in shown and shown.index("x3") < shown.index("Now the one to rank") < shown.index(
    "y1"
  )
  alone = template.fill(prompt=TALK, responses=["y1", "y2"], demonstrations=[])[1]["content"]
  assert "Example" not in alone and "Now the one" not in alone


GOOD = "answer: letter\nmessages:\n- {role: user, content: '{{ prompt }} {{ first }} {{ second }}'}\n"
WRONG = {
  "no such name": (None, "there is no template 'pairwize'; give a .yaml file, or one of mt_bench, pairwise, ranking"),
  "not YAML": ("answer: [", "is not valid YAML"),
  "other keys": (GOOD + "extra: 1\n", "has the keys answer and messages"),
  "no messages": ("answer: letter\nmessages: []\n", "messages is a list of"),
  "wrong role": (GOOD.replace("user", "judge"), "messages is a list of {role: system | user | assistant"),
  "unknown format": (GOOD.replace("letter", "number"), "has answer 'number', but this teacher reads letter or mark"),
  "a list of formats": (GOOD.replace("letter", "[letter]"), "has answer ['letter'], but"),
  "for a ranker": (GOOD.replace("letter", "ranking"), "has answer 'ranking', but"),
  "syntax": (GOOD.replace("{{ first }}", "{{ first"), "is not a valid template"),
  "leaves one out": (GOOD.replace("{{ second }}", ""), "does not show {{ second }}"),
  "unknown value": (GOOD.replace("{{ second }}", "{{ second }} {{ third }}"), "uses 'third', but all it is given is"),
  "unknown part": (GOOD.replace("{{ prompt }}", "{{ prompt.text }}"), "cannot be filled in"),
  "sum of text and number": (GOOD.replace("{{ first }}", "{{ first + 1 }}"), "cannot be filled in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_template_is_named_with_the_fix(case, tmp_path):
  content, words = WRONG[case]
  name = tmp_path / "mine.yaml" if content else "pairwize"
  if content:
    name.write_text(content)
  with pytest.raises(UserError) as error:
    load(name)
  assert str(error.value).startswith("teacher.template: ") and words in str(error.value)


def test_own_template_is_filled_and_its_digest_follows_its_content(tmp_path):
  file = tmp_path / "mine.yaml"
  file.write_text(GOOD)
  before = load(file)
  assert before.fill(prompt="p", first="x", second="y") == [{"role": "user", "content": "p x y"}]
  file.write_text(GOOD + "# changed\n")
  assert load(file).digest != before.digest

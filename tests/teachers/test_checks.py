"""The checks teacher: what the built-in checks accept, how wrong rows are refused, how pairs are judged."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsalign_jax.teachers import checks
from tsalign_jax.teachers.checks import ChecksTeacher, check, failed, load_plugins, score, validate
from tsalign_jax.types import CandidatePair, Prompt, UserError, Verdict

SATISFIED = [
  ({"name": "max_words", "limit": 3}, "Warm the pot."),
  ({"name": "max_words", "limit": 3}, "- don't over-steep - it"),  # dashes alone are not words
  ({"name": "min_words", "limit": 3}, "Warm the pot."),
  ({"name": "min_words", "limit": 2}, "tea—always"),
  ({"name": "max_sentences", "limit": 1}, "Dr. Lee, e.g., waits 3.5 minutes at 5 p.m. sharp!!"),
  ({"name": "max_sentences", "limit": 2}, "1. Boil water.\n2. Pour it."),
  ({"name": "paragraph_count", "count": 2}, "One\nstill one.\n\n \n\nTwo.\n"),
  ({"name": "include_words", "words": ["Tea", "ice cream"]}, "TEA'S best friend is ice\ncream."),
  ({"name": "include_words", "words": ["don't"]}, "Don’t!"),
  ({"name": "include_words", "words": ["C++", "café"]}, "I write C++ in a cafe\u0301."),
  ({"name": "include_words", "words": []}, "Anything"),
  ({"name": "exclude_words", "words": ["tea"]}, "Steam, steal, tear."),
  ({"name": "word_at_least", "word": "tea", "count": 2}, "Tea? _Tea_!"),
  ({"name": "bullet_count", "count": 3}, "Tips:\n- one\n  * two\n•three\n-4 degrees\n---\n- \n**Bold**"),
  ({"name": "numbered_list", "count": 2}, "Steps:\n1. boil\n - wait\n2) pour"),
  ({"name": "starts_with", "text": "In short"}, ' **"in  short**, no."'),
  ({"name": "ends_with", "text": "good luck!"}, "So: *Good luck*... "),
  ({"name": "contains_question"}, 'Why ("so soon")? Because.'),
  ({"name": "ends_with_question"}, '"Ready?" '),
  ({"name": "no_commas"}, "Boil; pour. Wait"),
  ({"name": "no_digits"}, "Three cups"),
  ({"name": "include_number"}, "1. wait 4 minutes"),
  ({"name": "title_line"}, "\n# Tea\nBoil water."),
  ({"name": "title_line"}, "**Tea**\n\nBoil water."),
  ({"name": "title_line"}, "<<Tea>>\nBoil water."),
  ({"name": "wrapped_in_quotes"}, '"Boil\nwater." '),
  ({"name": "wrapped_in_quotes"}, "“Boil.”"),
  ({"name": "json_object"}, ' {"tea": [1]}\n'),
  ({"name": "json_object"}, '```json\n{"tea": 1}\n```'),
  ({"name": "lowercase"}, "boil 2 cups."),
  ({"name": "uppercase"}, "BOIL 2 CUPS."),
]

VIOLATED = [
  ({"name": "max_words", "limit": 3}, "Warm the pot first."),
  ({"name": "min_words", "limit": 3}, "Warm it - !"),
  ({"name": "max_sentences", "limit": 1}, "boil water. pour it"),  # case is not looked at
  ({"name": "max_sentences", "limit": 1}, "Boil water\nPour it"),
  ({"name": "paragraph_count", "count": 2}, "One\ntwo"),
  ({"name": "include_words", "words": ["tea"]}, "Steam and teas"),
  ({"name": "include_words", "words": ["tea", "milk"]}, "Tea"),
  ({"name": "include_words", "words": [" "]}, "Tea"),
  ({"name": "exclude_words", "words": ["milk", "tea"]}, "A TEA-cup"),
  ({"name": "word_at_least", "word": "tea", "count": 2}, "Tea and steam"),
  ({"name": "bullet_count", "count": 2}, "- one\n- two\n- three"),
  ({"name": "numbered_list", "count": 2}, "1. boil\n3. pour"),
  ({"name": "numbered_list", "count": 2}, "1. boil\n2. pour\n3. drink"),
  ({"name": "starts_with", "text": "well"}, "Wellness"),
  ({"name": "starts_with", "text": "well"}, "Oh well"),
  ({"name": "starts_with", "text": ""}, "Anything"),
  ({"name": "ends_with", "text": "luck"}, "Good pluck"),
  ({"name": "ends_with", "text": "good luck"}, "Good luck with it"),
  ({"name": "contains_question"}, "See tea.org/?q=1 and ? alone"),
  ({"name": "ends_with_question"}, "Ready? Go."),
  ({"name": "no_commas"}, "1,000 cups"),
  ({"name": "no_commas"}, "茶，水"),
  ({"name": "no_digits"}, "٣ cups"),
  ({"name": "include_number"}, "1. boil two cups\n2. pour"),
  ({"name": "title_line"}, "Tea\nBoil water."),
  ({"name": "title_line"}, "# Tea"),
  ({"name": "wrapped_in_quotes"}, '"Boil" and "pour"'),
  ({"name": "wrapped_in_quotes"}, '"'),
  ({"name": "json_object"}, "[1]"),
  ({"name": "json_object"}, '{"tea": NaN}'),
  ({"name": "json_object"}, 'Here: {"tea": 1}'),
  ({"name": "json_object"}, '{"a":' * 100_000),
  ({"name": "lowercase"}, "Boil."),
  ({"name": "lowercase"}, "123"),
  ({"name": "uppercase"}, "BOIl"),
]

SHORT_AND_PLAIN = [{"name": "max_words", "limit": 3}, {"name": "no_commas"}]
TEACHER = ChecksTeacher()


@pytest.fixture
def registry(monkeypatch):
  """A registry of its own, so that what a test registers is gone after it."""
  monkeypatch.setattr(checks, "_REGISTRY", dict(checks._REGISTRY))


def pair(first: str, second: str, rows=SHORT_AND_PLAIN) -> CandidatePair:
  return CandidatePair(Prompt(3, [{"role": "user", "content": "Tea?"}], rows), first, second)


@pytest.mark.parametrize(("spec", "response"), SATISFIED)
def test_check_accepts_what_follows_the_instruction(spec, response):
  validate([spec], "row 0")
  assert failed(response, [spec]) == []


@pytest.mark.parametrize(("spec", "response"), VIOLATED)
def test_check_refuses_what_breaks_the_instruction(spec, response):
  validate([spec], "row 0")
  assert failed(response, [spec]) == [spec["name"]]


def test_every_builtin_check_has_an_accepted_and_a_refused_example():
  builtin = {name for name, entry in checks._REGISTRY.items() if "builtin" in entry.function.__module__}
  assert builtin == {spec["name"] for spec, _ in SATISFIED} == {spec["name"] for spec, _ in VIOLATED}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"name": "max_word", "limit": 4}, "unknown check 'max_word'; did you mean 'max_words'? (known: bullet_"),
    ({"name": "xyzzy"}, "unknown check 'xyzzy' (known: bullet_count, "),
    ({"name": "max_words"}, "check 'max_words' needs the argument 'limit' (int)"),
    ({"name": "max_words", "limit": None}, "check 'max_words' needs the argument 'limit' (int)"),
    (
      {"name": "max_words", "limits": 4},
      "check 'max_words' has no argument 'limits'; did you mean 'limit'? (it takes limit (int))",
    ),
    ({"name": "no_commas", "of": 4}, "check 'no_commas' has no argument 'of' (it takes no arguments)"),
    ({"name": "max_words", "limit": "4"}, "check 'max_words' wants 'limit' as int, but got '4'"),
    ({"name": "max_words", "limit": 4.0}, "check 'max_words' wants 'limit' as int, but got 4.0"),
    ({"name": "max_words", "limit": True}, "check 'max_words' wants 'limit' as int, but got True"),
    ({"name": "starts_with", "text": 4}, "check 'starts_with' wants 'text' as str, but got 4"),
    ({"name": "include_words", "words": "a"}, "check 'include_words' wants 'words' as list[str], but"),
    ({"name": "include_words", "words": [4]}, "check 'include_words' wants 'words' as list[str], but"),
    ({"limit": 4}, 'a check looks like {"name": "max_words", "limit": 40}, but got {\'limit\': 4}'),
    ("max_words", 'a check looks like {"name": "max_words", "limit": 40}, but got \'max_words\''),
  ],
)
def test_wrong_check_is_refused_with_the_row_and_the_fix(spec, message):
  with pytest.raises(UserError) as error:
    validate([spec], "row 3 of prompts.jsonl")
  assert str(error.value).startswith(f"row 3 of prompts.jsonl: {message}")


def test_checks_that_are_not_a_list_are_refused():
  with pytest.raises(UserError, match="row 3: checks must be a list, but got"):
    validate({"name": "no_commas"}, "row 3")


def test_argument_of_none_is_one_that_was_not_given():
  row = {"name": "no_commas", "limit": None, "words": None}
  validate([row], "row 3")
  assert score("plain", [row]) == 1.0


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_blank_response_satisfies_nothing(blank):
  assert score(blank, [*SHORT_AND_PLAIN, {"name": "exclude_words", "words": ["tea"]}]) == 0.0


def test_score_is_the_share_of_satisfied_checks():
  assert score("Boil, pour and then wait", [*SHORT_AND_PLAIN, {"name": "no_digits"}]) == pytest.approx(1 / 3)


def test_scoring_against_no_checks_is_refused():
  with pytest.raises(UserError, match="no checks"):
    score("Boil.", [])


def test_better_response_wins_and_the_evidence_names_what_the_other_failed():
  judgement = TEACHER.judge([pair("Boil water.", "Boil the water, then pour.")])[0]
  assert (judgement.verdict, judgement.probability) == (Verdict.FIRST, 1.0)
  assert judgement.evidence == {
    "first": {"score": 1.0, "failed": []},
    "second": {"score": 0.0, "failed": ["max_words", "no_commas"]},
  }


def test_equal_scores_are_a_tie():
  judgement = TEACHER.judge([pair("Boil, pour.", "Boil it and then pour")])[0]
  assert (judgement.verdict, judgement.probability) == (Verdict.TIE, 0.5)
  assert judgement.evidence["first"] != judgement.evidence["second"]


@pytest.mark.parametrize(("spec", "response"), SATISFIED + VIOLATED)
def test_scores_are_what_the_verdict_rests_on(spec, response):
  candidates = pair(response, "", [spec])
  ((first, second),) = TEACHER.scores([(candidates.prompt, [response, ""])])
  verdict = TEACHER.judge([candidates])[0].verdict
  assert verdict == (Verdict.FIRST if first > second else Verdict.TIE)


SPECS = st.sampled_from([spec for spec, _ in SATISFIED])


@given(st.text(), st.text(), st.lists(SPECS, min_size=1, max_size=5))
def test_swapping_the_responses_swaps_the_verdict(first, second, rows):
  forward, backward = TEACHER.judge([pair(first, second, rows), pair(second, first, rows)])
  swapped = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST, Verdict.TIE: Verdict.TIE}
  assert backward.verdict == swapped[forward.verdict]
  assert backward.probability == 1 - forward.probability
  assert 0 <= forward.evidence["first"]["score"] <= 1


@given(st.text(alphabet="ab .!?\n-*1,"), st.integers(0, 5))
def test_each_limit_of_words_separates_at_most_from_more(response, limit):
  at_most = failed(response + "x", [{"name": "max_words", "limit": limit}]) == []
  more = failed(response + "x", [{"name": "min_words", "limit": limit + 1}]) == []
  assert at_most != more


def test_default_checks_judge_prompts_that_have_none():
  teacher = ChecksTeacher(default=SHORT_AND_PLAIN)
  asked = [(Prompt(0, []), ["Boil, pour.", "Boil."]), (Prompt(0, [], [{"name": "no_digits"}]), ["Boil, pour."])]
  assert teacher.scores(asked) == [[0.5, 1.0], [1.0]]


def test_prompt_without_any_checks_is_named_before_anything_is_judged():
  prompts = [Prompt(0, [], SHORT_AND_PLAIN), Prompt(7, [])]
  with pytest.raises(UserError, match=r"^row 8 of prompts.jsonl has no checks"):
    TEACHER.validate_prompts(prompts, "prompts.jsonl")
  ChecksTeacher(default=SHORT_AND_PLAIN).validate_prompts(prompts)


def test_prompt_with_a_wrong_check_is_named():
  with pytest.raises(UserError, match=r"row 8 of prompts.jsonl: unknown check 'no_comma'; did you mean 'no_commas'"):
    TEACHER.validate_prompts([Prompt(7, [], [{"name": "no_comma"}])], "prompts.jsonl")


def test_wrong_default_check_is_refused_when_the_teacher_is_made():
  with pytest.raises(UserError, match="default checks: check 'max_words' needs the argument 'limit'"):
    ChecksTeacher(default=[{"name": "max_words"}])


def test_identity_depends_on_the_default_checks():
  assert ChecksTeacher().identity == ChecksTeacher().identity != ChecksTeacher(default=SHORT_AND_PLAIN).identity


def write_plugin(path, body: str, signature: str = "*, share: float = 0.5"):
  path.write_text(
    "from __future__ import annotations\n"
    "from tsalign_jax.teachers.checks import check\n"
    f"@check('vowels')\ndef vowels(response: str, {signature}) -> bool:\n  return {body}\n"
  )
  return path


def test_plugin_file_adds_a_check_and_loads_once(registry, tmp_path):
  path = write_plugin(tmp_path / "mine.py", "sum(map('aeiou'.count, response)) >= share * len(response)")
  assert load_plugins([str(path)]) == load_plugins([path])
  validate([{"name": "vowels"}, {"name": "vowels", "share": 1}], "row 0")
  assert failed("ab", [{"name": "vowels"}]) == []
  assert failed("ab", [{"name": "vowels", "share": 1}]) == ["vowels"]


def test_identity_depends_on_the_code_of_its_own_plugins_and_on_no_others(registry, tmp_path):
  without = ChecksTeacher().identity
  one = ChecksTeacher(plugins=[write_plugin(tmp_path / "one.py", "True")]).identity
  assert ChecksTeacher().identity == without != one
  del checks._REGISTRY["vowels"]
  assert ChecksTeacher(plugins=[write_plugin(tmp_path / "two.py", "False")]).identity not in (one, without)


def test_plugin_module_on_the_path_adds_a_check(registry, tmp_path, monkeypatch):
  write_plugin(tmp_path / "dotted_plugin.py", "True")
  monkeypatch.syspath_prepend(tmp_path)
  load_plugins(["dotted_plugin"])
  assert failed("b", [{"name": "vowels"}]) == []
  del sys.modules["dotted_plugin"]


@pytest.mark.parametrize("missing", ["nowhere/mine.py", "mine.py", "nowhere.mine"])
def test_missing_plugin_is_named(missing):
  with pytest.raises(UserError, match=f"^plugin '{missing}' "):
    load_plugins([missing])


def test_plugin_that_fails_to_import_shows_its_own_error_every_time(registry, tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("import a_module_that_is_not_there\n")
  for _ in range(2):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
      load_plugins([path])


def test_name_of_a_builtin_check_cannot_be_taken(registry):
  with pytest.raises(UserError, match=r"check 'no_commas' is .*builtin_checks.no_commas and .*; rename one"):
    check("no_commas")(lambda response: True)


@pytest.mark.parametrize("signature", ["limit: int", "*, limit", "*, limit: dict", "*, name: str"])
def test_check_with_an_argument_that_rows_cannot_set_is_refused(registry, tmp_path, signature):
  with pytest.raises(UserError, match=r"check 'vowels': argument '(limit|name)' must be keyword-only"):
    load_plugins([write_plugin(tmp_path / "mine.py", "True", signature)])

"""The `llm_judge` teacher: a language model is shown two responses and names the better one."""

import math
from pathlib import Path

from tsalign_jax.config import JudgeTeacher
from tsalign_jax.teachers.asking import Question
from tsalign_jax.teachers.chat import Clock, Reply
from tsalign_jax.teachers.chat_teacher import ChatTeacher, incomplete
from tsalign_jax.teachers.parse import find_letter, find_mark, letter_probabilities, shortened, without_thoughts
from tsalign_jax.teachers.store import Answer
from tsalign_jax.teachers.templates import load_template
from tsalign_jax.types import Prompt

FORMATS = {"letter": find_letter, "mark": find_mark}
ALTERNATIVES = 20  # the most that OpenAI's interface gives
SAMPLE = {"prompt": [{"role": "user", "content": "Tea?"}], "first": "Yes.", "second": "No."}


class LLMJudge(ChatTeacher):
  """Asks which of two responses is better, by a template, and reads a letter strictly."""

  def __init__(self, settings: JudgeTeacher, run: Path, where: str, clock: Clock):
    self._template = load_template(settings.template, f"{where}.template", answers=FORMATS, sample=SAMPLE)
    self._by_logprobs = settings.verdict == "logprobs"
    content = {"template": self._template.digest, "verdict": settings.verdict}
    super().__init__("llm_judge", settings, content, run, where, clock)

  def question(self, prompt: Prompt, first: str, second: str) -> Question:
    """The template with this prompt and these responses."""
    messages = self._template.fill(prompt=prompt.messages, first=first, second=second)
    extra = {"logprobs": True, "top_logprobs": ALTERNATIVES} if self._by_logprobs else {}
    return Question(messages, prompt.messages[-1]["content"], self._read, extra)

  def _read(self, reply: Reply) -> Answer | str:
    text = without_thoughts(reply.text).strip()
    found = FORMATS[self._template.answer](text)
    # A letter alone is whole even where the limit cut what followed, if what counts is its probability.
    whole = found and self._by_logprobs and self._template.answer == "letter" and reply.finish == "length"
    if not whole and (missing := incomplete(reply)):
      return missing
    if not found:
      return f"the answer holds no clear verdict: {shortened(text)}"
    if not self._by_logprobs:
      return Answer(found[0], None, reply.text)
    if reply.tokens is None:
      return "the answer came without log-probabilities"
    return _by_probability(letter_probabilities(reply.tokens, text, found[1]), reply)


def _by_probability(mass: dict[str, float] | None, reply: Reply) -> Answer | str:
  total = math.fsum(mass.values()) if mass else 0.0
  if not (mass and total > 0 and math.isfinite(total)):
    return f"no log-probabilities stand at the verdict: {shortened(reply.text)}"
  best = max(mass.values())
  likeliest = [letter for letter in "ABC" if mass[letter] == best]
  return Answer(likeliest[0] if len(likeliest) == 1 else "C", (mass["A"] + mass["C"] / 2) / total, reply.text)

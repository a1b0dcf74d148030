"""What a language model answered: strict readings, that refuse whatever could be read in two ways.

An answer that is refused is asked for again, and in the end the pair is an ERROR: never a guess.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

Find = Callable[[str], tuple[str, int] | None]  # an answer's text to the letter of its verdict and where that stands

_LETTER = re.compile(r"""[\s*_"'`(\[]*([ABC])[\s*_"'`)\].:]*""")
_MARK = re.compile(r"\[\[([ABC])\]\]")
_RANKING = re.compile(r"\s*\[?\d{1,4}\]?(?:\s*>\s*\[?\d{1,4}\]?)*\s*\.?\s*", re.ASCII)
_SPACE = " \t\r\n\u0120\u2581"  # also as tokenizers write it: Ġ and ▁


class Token(NamedTuple):
  """One token of an answer, and the log-probabilities of the likeliest tokens in its place."""

  text: str
  alternatives: Sequence[tuple[str, float]]


def shortened(text: str) -> str:
  """A text in quotes, and of a long one what it ends with: that is where answers have their verdict."""
  return repr(text if len(text) <= 80 else f"... {text[-80:]}")


def without_thoughts(text: str) -> str:
  """What follows the last </think>: a reasoning model's answer without its reasoning."""
  return text.rpartition("</think>")[2]


def find_letter(text: str) -> tuple[str, int] | None:
  """(letter, place) if the whole answer is A, B or C, give or take quotes, emphasis, brackets and a full stop.

  "A"  " **B**."  "[[C]]"             read
  "A is better"  "Answer: A"  "a"     refused: "A better one is B" begins like this, too
  """
  found = _LETTER.fullmatch(text)
  return (found[1], found.start(1)) if found else None


def find_mark(text: str) -> tuple[str, int] | None:
  """(letter, place) of the last [[A]], [[B]] or [[C]], if all of these marks in the answer agree.

  "A or B? I would say B ... [[A]]"   A: letters outside of marks are not a verdict
  "[[A]] would be kind, but [[B]]"    refused: nothing tells which of the two is meant
  """
  marks = list(_MARK.finditer(text))
  if len({mark[1] for mark in marks}) != 1:
    return None
  return marks[-1][1], marks[-1].start(1)


def read_ranking(text: str, count: int) -> tuple[int, ...] | None:
  """Indices of `count` responses, best first, if the whole answer is their numbers from 1, like "[2] > [1] > [3]".

  Each number must come exactly once: a permutation with a gap or a repetition is refused, not repaired.
  """
  if not _RANKING.fullmatch(text):
    return None
  order = tuple(int(number) - 1 for number in re.findall(r"[0-9]+", text))
  return order if sorted(order) == list(range(count)) else None


def letter_probabilities(tokens: Sequence[Token], text: str, place: int) -> dict[str, float] | None:
  """Probabilities of A, B and C where the verdict's letter stands in `text`, whose tokens these are.

  The letter's token may hold more than the letter: beside "[[A" the alternatives are "[[B" and "[[C". A letter that
  is not among the alternatives counts as 0. None if the tokens do not spell the text.
  """
  start = "".join(token.text for token in tokens).rfind(text)
  at = start + place
  for token in tokens if start >= 0 else ():
    if at < len(token.text):
      before, after = token.text[:at].lstrip(_SPACE), token.text[at + 1 :].rstrip(_SPACE)
      return {letter: _mass(token.alternatives, f"{before}{letter}{after}") for letter in "ABC"}
    at -= len(token.text)
  return None


def _mass(alternatives: Sequence[tuple[str, float]], wanted: str) -> float:
  """Probability of a token, with and without white space around it."""
  return math.fsum(math.exp(logprob) for text, logprob in alternatives if text.strip(_SPACE) == wanted)

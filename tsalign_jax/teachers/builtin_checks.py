"""The built-in checks, in the spirit of IFEval (Zhou et al. 2023): what can be verified without a judge.

What the words mean here:

    word       a run without white space (or em dash) that holds a letter or a digit: "don't", "well-known"
    mention    a word or phrase, in any case, with no letter or digit directly before or after it: "Tea's"
               mentions "tea", "steam" does not; white space inside a phrase is any white space
    sentence   ends at . ! ? before white space, or at a line break, and holds a word; "3.5", "Dr. Who" and
               "e.g. tea" do not end one; case is not looked at, as an uncased student cannot
    bullet     a line that begins with "- ", "* " or a bullet character, and holds a word
"""

import json
import re
import unicodedata

from tsalign_jax.teachers.checks import check

_QUOTES = "\"'“”‘’«»`"
_WRAPPING = _QUOTES + "*_ \t\r\n"  # quotation marks, emphasis and white space around an answer do not count
_BULLET = re.compile(r"[ \t]*(?:[-*](?=[ \t])|[•◦‣▪●])")
_NUMBERING = re.compile(r"[ \t]*(\d{1,3})[.)](?=[ \t])")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s|$)")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # the "e.g" of "e.g.", the "p.m" of "p.m."
_ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "vs", "jr", "sr", "approx"])
_TITLE = re.compile(r"#{1,6}\s+\S.*|\*\*[^*]+\*\*:?|<<[^<>]+>>")


@check("max_words")
def max_words(response: str, *, limit: int) -> bool:
  """True if the response has at most `limit` words."""
  return _word_count(response) <= limit


@check("min_words")
def min_words(response: str, *, limit: int) -> bool:
  """True if the response has at least `limit` words."""
  return _word_count(response) >= limit


@check("max_sentences")
def max_sentences(response: str, *, limit: int) -> bool:
  """True if the response has at most `limit` sentences; each item of a list is at least one."""
  return sum(_sentence_count(line) for line in response.splitlines()) <= limit


@check("paragraph_count")
def paragraph_count(response: str, *, count: int) -> bool:
  """True if blank lines part the response into exactly `count` blocks that hold a word."""
  return sum(_word_count(block) > 0 for block in re.split(r"\n\s*\n", response)) == count


@check("include_words")
def include_words(response: str, *, words: list[str]) -> bool:
  """True if the response mentions every one of the words or phrases."""
  return all(_mentions(response, word) for word in words)


@check("exclude_words")
def exclude_words(response: str, *, words: list[str]) -> bool:
  """True if the response mentions none of the words or phrases."""
  return not any(_mentions(response, word) for word in words)


@check("word_at_least")
def word_at_least(response: str, *, word: str, count: int) -> bool:
  """True if the response mentions the word or phrase `count` times or more."""
  return _mentions(response, word) >= count


@check("bullet_count")
def bullet_count(response: str, *, count: int) -> bool:
  """True if the response has exactly `count` bullets, nested ones included."""
  return len(_items(_BULLET, response)) == count


@check("numbered_list")
def numbered_list(response: str, *, count: int) -> bool:
  """True if the lines that begin like "1. " or "1) " are numbered 1, 2, ... `count`, in this order."""
  return [int(item[1]) for item in _items(_NUMBERING, response)] == list(range(1, count + 1))


@check("starts_with")
def starts_with(response: str, *, text: str) -> bool:
  """True if the response begins with a mention of `text`; quotation marks and emphasis do not count."""
  phrase = _pattern(text.lstrip(_WRAPPING))
  return re.match(rf"{phrase}(?![^\W_])", _fold(response.lstrip(_WRAPPING))) is not None


@check("ends_with")
def ends_with(response: str, *, text: str) -> bool:
  """True if the response ends with a mention of `text`; . ! ? quotation marks and emphasis do not count."""
  wrapping = _WRAPPING + ".!?…"
  phrase = _pattern(text.rstrip(wrapping))
  return re.search(rf"(?<![^\W_]){phrase}\Z", _fold(response.rstrip(wrapping))) is not None


@check("contains_question")
def contains_question(response: str) -> bool:
  """True if a question mark ends a word somewhere; one inside a word, as in a web address, does not count."""
  return re.search(r"\w[\"'”’»)\]*_]*\?(?!\w)", response) is not None


@check("ends_with_question")
def ends_with_question(response: str) -> bool:
  """True if a question mark comes last; closing brackets, quotation marks and emphasis do not count."""
  return response.rstrip(_WRAPPING + ")]").endswith("?")


@check("no_commas")
def no_commas(response: str) -> bool:
  """True if no comma of any script occurs, not even within a number."""
  return not set(",，、،") & set(response)


@check("no_digits")
def no_digits(response: str) -> bool:
  """True if no digit of any script occurs; number words are allowed."""
  return not any(character.isdigit() for character in response)


@check("include_number")
def include_number(response: str) -> bool:
  """True if a digit occurs other than in the numbering of a list; number words do not count."""
  return any(not no_digits(_NUMBERING.sub("", line, count=1)) for line in response.splitlines())


@check("title_line")
def title_line(response: str) -> bool:
  """True if the first line is a title ("# Tea", "**Tea**" or "<<Tea>>") and words follow on later lines."""
  title, _, body = response.strip().partition("\n")
  return bool(_TITLE.fullmatch(title.strip()) and _word_count(title) and _word_count(body))


@check("wrapped_in_quotes")
def wrapped_in_quotes(response: str) -> bool:
  """True if the response as a whole is one quotation: a double quotation mark at each end and none inside."""
  return re.fullmatch(r"[\"“][^\"“”]*\w[^\"“”]*[\"”]", response.strip()) is not None


@check("json_object")
def json_object(response: str) -> bool:
  """True if the response is one JSON object and nothing else, apart from a code fence around it."""
  fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)```", response.strip(), re.DOTALL | re.IGNORECASE)
  try:
    return isinstance(json.loads(fenced[1] if fenced else response, parse_constant=_reject_constant), dict)
  except (ValueError, RecursionError):
    return False


@check("lowercase")
def lowercase(response: str) -> bool:
  """True if there is a letter and none is upper case. A student with an uncased tokenizer cannot see this."""
  return response.islower()


@check("uppercase")
def uppercase(response: str) -> bool:
  """True if there is a letter and none is lower case. A student with an uncased tokenizer cannot see this."""
  return response.isupper()


def _word_count(text: str) -> int:
  return sum(any(map(str.isalnum, run)) for run in text.replace("—", " ").split())


def _sentence_count(line: str) -> int:
  """How many sentences a line holds; the number of a list item is not one ("1. Boil water." is one)."""
  line = _NUMBERING.sub("", line, count=1)
  ends = [end.end() for end in _SENTENCE_END.finditer(line) if not _is_abbreviation(line, end)]
  starts_and_ends = zip([0, *ends], [*ends, len(line)], strict=True)
  return sum(_word_count(line[start:end]) > 0 for start, end in starts_and_ends)


def _is_abbreviation(line: str, end: re.Match) -> bool:
  before = line[: end.start()].split()
  word = before[-1].lstrip("([" + _QUOTES).lower() if before else ""
  return end[0] == "." and (word in _ABBREVIATIONS or _DOTTED.fullmatch(word) is not None)


def _items(marker: re.Pattern, response: str) -> list[re.Match]:
  found = [marker.match(line) for line in response.splitlines()]
  return [item for item in found if item and _word_count(item.string[item.end() :])]


def _mentions(response: str, phrase: str) -> int:
  return len(re.findall(rf"(?<![^\W_]){_pattern(phrase)}(?![^\W_])", _fold(response)))


def _pattern(phrase: str) -> str:
  """A regular expression for the folded phrase; a blank phrase matches nowhere."""
  return r"\s+".join(map(re.escape, _fold(phrase).split())) or r"(?!)"


def _fold(text: str) -> str:
  """The text without case and with one form of each accent and apostrophe, so that "Don’t" is "don't"."""
  return unicodedata.normalize("NFC", text).replace("’", "'").replace("‘", "'").casefold()


def _reject_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")

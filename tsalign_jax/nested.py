"""What JSON and YAML hold: dictionaries and lists in each other."""

from collections.abc import Iterator
from typing import Any


def walk(content: Any, but: str | None = None) -> Iterator[tuple[str | int, Any]]:
  """(name or index, value) of everything in it, however deep, the outer first; nothing from within fields named `but`.

  list(walk({"a": [1], "b": {"c": 2}}, but="b")) is [("a", [1]), (0, 1), ("b", {"c": 2})]
  """
  parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
  for name, part in parts:
    yield name, part
    if name != but:
      yield from walk(part, but)

"""Bytes that a compiled TPU program moves to and from main memory, counted in its scheduled HLO text.

`cost_analysis()` counts the body of a loop once and a fusion's operands whole, so it cannot tell a cache that is
copied from one that is read. Here an instruction moves the bytes of its operands and results that lie in main memory
(arrays in faster memories carry a space, `S(1)` and the like, in their layout), with these exceptions:

* a slice or gather reads what it takes, not what it takes it from, also where it is the only use of an operand inside
  a fusion;
* an update of a slice, or a scatter, writes the new part in place, as XLA guarantees (where it cannot, it inserts a
  `copy`, which is counted);
* a loop counts as often as it runs, where its condition is `counter < constant`; once, where the data decides;
* of a conditional, the branch that moves most.

Operands that a matrix product reads several times for want of space count once. Sizes are those of the tiled layout,
padding included. `programs.known_loops` holds the method against loops of which the traffic is known.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
  *("optimization-barrier", "domain", "add-dependency"),
}
TAKES = {"dynamic-slice", "slice", "gather"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand holds the new part


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape: its size in bytes, and whether it lies in main memory."""

  size: int
  main: bool

  @property
  def moved(self) -> int:
    """Bytes of main memory that reading or writing all of it moves."""
    return self.size if self.main else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO; `rest` is what follows the opcode."""

  name: str
  opcode: str
  shape: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
    return found and found[1]


class Program:
  """HLO text as computations of instructions."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.roots: dict[str, Instruction] = {}
    for line in text.splitlines():
      if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        current = header[2]
        self.computations[current] = {}
        if header[1]:
          self.entry = current
      elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
        self.computations[current][found[2]] = instruction = _instruction(found[2], found[3])
        if found[1]:
          self.roots[current] = instruction

  def traffic(self, computation: str | None = None) -> int:
    """Bytes moved by one run of a computation, by default of the whole program."""
    return sum(moved for moved, *_ in self.breakdown(computation or self.entry))

  def breakdown(self, computation: str) -> list[tuple[int, str, str]]:
    """(bytes, opcode, name) of each instruction of a computation, largest first."""
    lines = self.computations[computation]
    return sorted(((self._moved(lines, one), one.opcode, one.name) for one in lines.values()), reverse=True)

  def open_loop(self) -> str:
    """The body of the one loop that ends when the data says so: the decoding loop."""
    loops = [one for lines in self.computations.values() for one in lines.values() if one.opcode == "while"]
    (body,) = {loop.called("body") for loop in loops if self._trips(loop) is None}
    return body

  def _trips(self, loop: Instruction) -> int | None:
    condition = loop.called("condition")
    root = self.roots[condition]
    if root.opcode != "compare" or "direction=LT" not in root.rest:
      return None
    limit = self.computations[condition][root.operands[1]]
    return int(limit.rest.strip("(").split(")")[0]) if limit.opcode == "constant" else None

  def _moved(self, lines: dict[str, Instruction], one: Instruction) -> int:
    operands = [array for name in one.operands for array in lines[name].shape]
    if one.opcode in FREE or one.opcode.endswith("-done"):
      return 0
    if one.opcode == "while":
      return (self._trips(one) or 1) * (self.traffic(one.called("body")) + self.traffic(one.called("condition")))
    if one.opcode == "conditional":
      return max(map(self.traffic, _branches(one)))
    if one.opcode in ("call", "async-start"):
      return self.traffic(one.called("to_apply") or one.called("calls"))
    if one.opcode == "fusion":
      called = one.called("calls")
      read = sum(self._read(called, index, array.size) for index, array in enumerate(operands) if array.main)
      return read + self._written(called, self.roots[called], one.shape)
    if one.opcode.endswith("-start"):
      return sum(array.moved for array in operands) + _target(one).moved
    if one.opcode in TAKES:
      return one.shape[0].size * operands[0].main + one.shape[0].moved
    if one.opcode in UPDATES:
      new = operands[UPDATES[one.opcode]]
      return new.moved + new.size * one.shape[0].main
    return sum(array.moved for array in (*operands, *one.shape))

  def _read(self, computation: str, index: int, whole: int) -> int:
    """Bytes that a fused computation reads of its parameter `index`, which has `whole` bytes."""
    taken = 0
    for use in self._uses(computation, self._parameter(computation, index)):
      user, place = use or (None, None)
      if user and place == 0 and user.opcode in TAKES:
        taken += user.shape[0].size
      elif not (user and place == 0 and user.opcode in UPDATES):
        taken += whole
    return min(whole, taken)

  def _parameter(self, computation: str, index: int) -> str:
    lines = self.computations[computation].values()
    return next(one.name for one in lines if one.opcode == "parameter" and one.rest.startswith(f"({index})"))

  def _uses(self, computation: str, name: str) -> Iterator[tuple[Instruction, int] | None]:
    """(instruction, which operand) wherever a value is used, seen through bitcasts and fusions; None as a result."""
    if self.roots[computation].name == name:
      yield None
    for user in self.computations[computation].values():
      for place in (place for place, operand in enumerate(user.operands) if operand == name):
        if user.opcode == "bitcast":
          yield from self._uses(computation, user.name)
        elif user.opcode == "fusion":
          called = user.called("calls")
          for use in self._uses(called, self._parameter(called, place)):
            yield from self._uses(computation, user.name) if use is None else (use,)
        else:
          yield user, place

  def _written(self, computation: str, root: Instruction, shape: tuple[Array, ...]) -> int:
    """Bytes that a fused computation writes, where its result has this shape."""
    lines = self.computations[computation]
    if root.opcode == "tuple":
      parts = zip(root.operands, shape, strict=True)
      return sum(self._written(computation, lines[name], (array,)) for name, array in parts)
    if root.opcode == "bitcast":
      return self._written(computation, lines[root.operands[0]], shape)
    if root.opcode == "fusion":
      return self._written(root.called("calls"), self.roots[root.called("calls")], shape)
    if root.opcode in UPDATES:
      return lines[root.operands[UPDATES[root.opcode]]].shape[0].size * shape[0].main
    return sum(array.moved for array in shape)


def _branches(conditional: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
  if listed:
    return re.findall(r"[\w.\-]+", listed[1])
  return [conditional.called(f"{which}_computation") for which in ("true", "false")]


def _target(start: Instruction) -> Array:
  """What an asynchronous operation writes: the results of a copy lead with it, those of others with the source."""
  return start.shape[0] if start.opcode == "copy-start" or len(start.shape) == 1 else start.shape[1]


def _instruction(name: str, text: str) -> Instruction:
  shape, after = _until_balanced(text) if text.startswith("(") else text.split(" ", 1)
  opcode, rest = re.match(r"\s*([\w\-]+)(.*)", after).groups()
  inside, _ = _until_balanced(rest)
  operands = tuple(re.findall(r"%([\w.\-]+)", inside)) if opcode not in ("constant", "parameter") else ()
  return Instruction(name, opcode, _arrays(shape), operands, rest)


def _until_balanced(text: str) -> tuple[str, str]:
  """(the parenthesised start of the text, what follows)."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[: index + 1], text[index + 1 :]
  raise ValueError(f"unbalanced: {text[:80]}")


@functools.lru_cache(maxsize=4096)
def _arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of a shape, tuple or not: bf16[32,4096]{1,0:T(8,128)(2,1)S(1)} is 256 KiB and not in main memory."""
  return tuple(_array(*found) for found in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape))


def _array(dtype: str, dims: str, layout: str) -> Array:
  sizes = [int(size) for size in dims.split(",") if size]
  order, _, tiling = layout.partition(":")
  if tile := re.search(r"T\(([\d,]+)\)", tiling):
    sides = [int(side) for side in reversed(tile[1].split(","))]
    for axis, side in zip((int(axis) for axis in order.split(",") if axis), sides, strict=False):
      sizes[axis] = -(-sizes[axis] // side) * side
  space = re.search(r"S\((\d+)\)", tiling)
  return Array(math.ceil(math.prod(sizes) * _bytes(dtype)), main=space is None or space[1] == "0")


def _bytes(dtype: str) -> float:
  """Of one element; the name of a dtype says its bits: f32, bf16, s4, f8e4m3fn."""
  bits = re.search(r"\d+", dtype)
  return int(bits[0]) / 8 if bits else {"pred": 1.0}.get(dtype, 0.0)

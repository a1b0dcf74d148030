"""How sampling time grows with branches, prompt length and prompts: `python -m benchmarks.growth`.

Prints a table in markdown, and draws it where `--svg` says.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.contest import ours
from benchmarks.terminal import add_prompts, command, note, parser, print_machine
from benchmarks.workload import load_chat, prompts
from tsalign_jax.report.svg import Element, add, drawing, to_string

BASE = {"responses": 8, "prompt_tokens": 128, "prompts": 16}
SWEEPS = {
  "responses": (1, 2, 4, 8, 16),
  "prompt_tokens": (64, 128, 256, 512, 1024),
  "prompts": (8, 16, 32, 64, 128),
}
NAMES = {"responses": "branches a prompt", "prompt_tokens": "prompt tokens", "prompts": "prompts at once"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a }
.name { font-weight: 600; fill: #1f2328 }
.grid { stroke: #d0d7de; stroke-width: 1 }
.line { fill: none; stroke: #0969da; stroke-width: 2.5 }
.dot { fill: #0969da }
.proportional { stroke: #8c959f; stroke-width: 1.5; stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .name { fill: #f0f6fc } .grid { stroke: #3d444d }
  .line { stroke: #4493f8 } .dot { fill: #4493f8 } .proportional { stroke: #656c76 }
}
"""
PANEL, LEFT, TOP, SIZE = 250, 44, 40, 170


class Point(NamedTuple):
  """One measurement of a sweep."""

  value: int
  seconds: float
  tokens: int


def main() -> Mapping[str, float]:
  """What an extra unit costs at the end of each sweep, in units of the first."""
  out = parser(__doc__.splitlines()[0])
  add_prompts(out)
  out.add_argument("--new-tokens", type=int, default=64, help="length of every response")
  out.add_argument("--largest", type=int, help="leave out values of a sweep beyond this many times its first")
  out.add_argument("--svg", type=Path, help="file to draw the three curves into")
  options = out.parse_args()
  if options.largest is not None and options.largest < 2:
    out.error("--largest: at least 2, or there is no growth")
  curves = {name: _sweep(options, name, values) for name, values in SWEEPS.items()}
  print(_markdown(curves, options.new_tokens))
  print_machine()
  if options.svg:
    options.svg.write_text(to_string(draw(curves)) + "\n", encoding="utf-8")
  return {f"extra_{name}": round(extra(points, points[-1]), 3) for name, points in curves.items()}


def _sweep(options: argparse.Namespace, name: str, values: Sequence[int]) -> list[Point]:
  """Sampling time at each value of one size, the others at their base."""
  points = []
  for value in values:
    if options.largest and value > values[0] * options.largest:
      break
    sizes = BASE | {name: value}
    note(f"{NAMES[name]}: {value}")
    with ours("Sampling").start(_work(options, **sizes), {"batch_prompts": sizes["prompts"]}, options.cache) as worker:
      worker.ready()
      runs = [worker.run(seed) for seed in range(1, options.runs + 1)]
    points.append(Point(value, median(run["seconds"] for run in runs), runs[0]["units"]))
  return points


def _work(options: argparse.Namespace, *, responses: int, prompt_tokens: int, prompts: int) -> dict:
  """Prompts of exactly that length, made of real ones, and responses that no end token ends."""
  text = _tokens(options)
  rows = [[text[(row * 37 + column) % len(text)] for column in range(prompt_tokens)] for row in range(prompts)]
  return {
    "policy": str(options.policy),
    "prompts": rows,
    "responses": responses,
    "max_new_tokens": options.new_tokens,
    "stop": [],
  }


def _tokens(options: argparse.Namespace) -> list[int]:
  chat = load_chat(options)
  return [token for prompt in prompts(options, 32) for token in chat.prompt_tokens(prompt.messages)]


def extra(points: Sequence[Point], point: Point) -> float:
  """What each unit after the first costs, relative to the first: 1 is proportional growth, 0 is free."""
  first = points[0]
  return (point.seconds / first.seconds - 1) / (point.value / first.value - 1)


def _markdown(curves: Mapping[str, Sequence[Point]], new_tokens: int) -> str:
  lines = [
    "| grows | value | seconds | tokens/s | times the first | each extra costs, of the first |",
    "|---|---|---|---|---|---|",
  ]
  for name, points in curves.items():
    for point in points:
      share = "" if point is points[0] else f"{extra(points, point):.2f}"
      cells = (
        f"{NAMES[name]}",
        f"{point.value:,}",
        f"{point.seconds:.2f}",
        f"{point.tokens / point.seconds:,.0f}",
        f"{point.seconds / points[0].seconds:.2f}",
        share,
      )
      lines.append(f"| {' | '.join(cells)} |")
  fixed = ", ".join(f"{value} {NAMES[name]}" for name, value in BASE.items())
  return "\n".join([*lines, "", f"Where it does not grow: {fixed}; {new_tokens} new tokens."])


def draw(curves: Mapping[str, Sequence[Point]]) -> Element:
  """One panel a sweep, both axes in doublings; the dashed line is cost in proportion."""
  ends = (f"{NAMES[name]}: {points[-1].seconds / points[0].seconds:.2f} times" for name, points in curves.items())
  svg = drawing("How sampling time grows", "; ".join(ends), LEFT + PANEL * len(curves), TOP + SIZE + 54)
  add(svg, "style", text=STYLE)
  for index, (name, points) in enumerate(curves.items()):
    _panel(svg, LEFT + PANEL * index, NAMES[name], points)
  add(svg, "text", text="Both axes in doublings; dashed: time in proportion.", x=LEFT, y=TOP + SIZE + 44)
  return svg


def _panel(svg: Element, left: float, name: str, points: Sequence[Point]) -> None:
  first, steps = points[0], max(1, (points[-1].value // points[0].value).bit_length() - 1)

  def place(factor_x: float, factor_y: float) -> tuple[float, float]:
    return left + SIZE * math.log2(factor_x) / steps, TOP + SIZE - SIZE * math.log2(factor_y) / steps

  add(svg, "text", "name", name, x=left, y=18)
  for step in range(steps + 1):
    x, y = place(2**step, 2**step)
    add(svg, "line", "grid", x1=left, x2=left + SIZE, y1=y, y2=y)
    add(svg, "text", text=f"{2**step}x", x=left - 8, y=y + 4, text_anchor="end")
    add(svg, "text", text=f"{first.value * 2**step:,}", x=x, y=TOP + SIZE + 18, text_anchor="middle")
  (x1, y1), (x2, y2) = place(1, 1), place(2**steps, 2**steps)
  add(svg, "line", "proportional", x1=x1, y1=y1, x2=x2, y2=y2)
  places = [place(point.value / first.value, point.seconds / first.seconds) for point in points]
  add(svg, "polyline", "line", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places))
  for point, (x, y) in zip(points, places, strict=True):
    dot = add(svg, "circle", "dot", cx=x, cy=y, r=3.5)
    add(dot, "title", text=f"{point.value:,} {name}: {point.seconds:.2f} s")
  factor = points[-1].seconds / first.seconds
  add(svg, "text", "name", f"{factor:.1f}x", x=places[-1][0] + 6, y=places[-1][1] + 4)
  add(svg, "text", text="time", x=left - 8, y=TOP - 10, text_anchor="end")


if __name__ == "__main__":
  command(main)

"""Small charts: pure functions from numbers to an SVG string.

Colours are not here: an element carries a CSS class (`strong`, `other`, `quiet`, `part-0` ...), and the page that
shows the chart colours it for light, dark and paper.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from tsalign_jax.report.svg import Element, add, drawing, to_string
from tsalign_jax.report.words import number, percent

Point = tuple[float, float | None]
Format = Callable[[float | None], str]
Reference = tuple[float, str]

_WIDTH, _HEIGHT = 420, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 16, 34, 40
_CHARACTER = 6.6  # the width of an average character of the labels
_MOST_POINTS = 240  # more would be finer than the pixels
_LINE = 18  # the height of a line of a legend
_PARTS = 10  # how many colours the page has for parts
_ROW = 30  # the height of a row of bars


@dataclasses.dataclass(frozen=True)
class Series:
  """A line of a chart, in segments that are not joined to each other; a missing y breaks it as well.

  `intervals` holds the (low, high) of each point of the first segment, for error bars. `style` is a CSS class.
  """

  label: str
  segments: Sequence[Sequence[Point]]
  style: str = "strong"
  intervals: Sequence[tuple[float | None, float | None]] = ()


@dataclasses.dataclass(frozen=True)
class _Frame:
  """Where data coordinates lie on the drawing; the y axis goes from the first of its ticks to the last."""

  x_range: tuple[float, float]
  y_ticks: Sequence[float]

  def x(self, value: float) -> float:
    low, high = self.x_range
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

  def y(self, value: float) -> float:
    low, high = self.y_ticks[0], self.y_ticks[-1]
    return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def by_round(
  title: str,
  series: Sequence[Series],
  *,
  is_share: bool = False,
  from_zero: bool = False,
  reference: Reference | None = None,
) -> str:
  """A chart of a few values for each round: dots, error bars where given, a labelled reference line.

  Shares are shown as percentages. `from_zero` starts the axis there, for amounts that are to be compared.
  """
  format = _format(is_share)
  rounds = sorted({int(x) for line in series for segment in line.segments for x, _ in segment})
  anchors = ([0.0] if from_zero else []) + ([reference[0]] if reference else [])
  frame = _Frame((rounds[0] - 0.5, rounds[-1] + 0.5), _y_ticks(series, anchors))
  svg = drawing(title, _describe(series, format), _WIDTH, _HEIGHT)
  shown = range(rounds[0], rounds[-1] + 1, math.ceil(len(rounds) / 10))
  _axes(svg, frame, {round: str(round) for round in shown}, "round", is_share)
  if reference:
    y = frame.y(reference[0])
    add(svg, "line", "reference", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
  for line in series:
    _error_bars(svg, frame, line)
    _polylines(svg, frame, line)
    _dots(svg, frame, line, format, labelled=len(series) == 1 and len(rounds) <= 8)
  _legend(svg, series, reference)
  return to_string(svg)


def by_step(
  title: str,
  series: Sequence[Series],
  *,
  boundaries: Mapping[int, float],
  is_share: bool = False,
  reference: Reference | None = None,
) -> str:
  """A chart of a value for each step; `boundaries` holds the step at which each round begins.

  Of a long series, runs of neighbouring steps are averaged, and the chart says so.
  """
  size = math.ceil(max(sum(map(len, line.segments)) for line in series) / _MOST_POINTS)
  drawn = [dataclasses.replace(line, segments=[_means(part, size) for part in line.segments]) for line in series]
  end = 1 + max(x for line in series for segment in line.segments for x, _ in segment)
  frame = _Frame((0, end), _y_ticks(drawn, [reference[0]] if reference else []))
  svg = drawing(title, _describe(series, _format(is_share)), _WIDTH, _HEIGHT)
  name = "step" if size == 1 else f"step (each point is the mean of {size})"
  whole = [int(tick) for tick in nice_ticks(0, end) if tick <= end and tick == int(tick)]
  _axes(svg, frame, {tick: f"{tick:,}" for tick in whole}, name, is_share)
  _round_boundaries(svg, frame, boundaries)
  if reference:
    y = frame.y(reference[0])
    add(svg, "line", "reference", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
  for line in drawn:
    _polylines(svg, frame, line)
  _legend(svg, series, reference)
  return to_string(svg)


def stacked_bars(title: str, rows: Mapping[str, Mapping[str, float]], *, format: Format = number) -> str:
  """A horizontal bar for each row, split into its parts; totals at the right, parts in order of appearance."""
  parts = list(dict.fromkeys(part for row in rows.values() for part in row))
  styles = {part: f"part part-{index % _PARTS}" for index, part in enumerate(parts)}
  totals = {label: sum(row.values()) for label, row in rows.items()}
  left = 10 + _CHARACTER * max(map(len, rows), default=0)
  right = 10 + _CHARACTER * max((len(format(total)) for total in totals.values()), default=0)
  scale = (_WIDTH - left - right) / (max(totals.values(), default=0) or 1)
  places = _legend_places(parts)
  top = _LINE * (1 + max((line for line, _ in places), default=0)) + 8
  described = (", ".join([f"{label}: {format(totals[label])}", *map(str, row)]) for label, row in rows.items())
  svg = drawing(title, "; ".join(described), _WIDTH, top + _ROW * len(rows))
  for part, (line, x) in zip(parts, places, strict=True):
    add(svg, "rect", styles[part], x=x + 2, y=_LINE * line + 1, width=12, height=12)
    add(svg, "text", text=part, x=x + 21, y=_LINE * line + 11)
  for index, (label, row) in enumerate(rows.items()):
    y = top + _ROW * index
    add(svg, "text", text=label, x=left - 8, y=y + 15, text_anchor="end")
    pieces = [(f"{part}: {format(value)}", value * scale, styles[part]) for part, value in row.items()]
    end = _bar(svg, left, y, pieces)
    add(svg, "text", text=format(totals[label]), x=end + 6, y=y + 15)
  return to_string(svg)


def split_bar(title: str, parts: Sequence[tuple[str, int, str]]) -> str:
  """One bar for the whole, split into three parts of (name, count, CSS class), with the counts below."""
  whole = sum(count for _, count, _ in parts) or 1
  labels = [f"{count:,} {name}" for name, count, _ in parts]
  svg = drawing(title, ", ".join(labels), _WIDTH, 44)
  widths = [count / whole * _WIDTH for _, count, _ in parts]
  styles = [f"part {style}" for _, _, style in parts]
  _bar(svg, 0, 0, list(zip(labels, widths, styles, strict=True)))
  # The middle label stands below its part, as far as its neighbours leave room.
  middle = min(max(widths[0] + widths[1] / 2, 0.28 * _WIDTH), 0.72 * _WIDTH)
  for label, x, anchor in zip(labels, (0, middle, _WIDTH), ("start", "middle", "end"), strict=True):
    add(svg, "text", text=label, x=x, y=40, text_anchor=anchor)
  return to_string(svg)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round values, 1, 2 or 5 times a power of ten apart, that enclose low < high in about `count` steps."""
  least = (high - low) / count
  power = 10.0 ** math.floor(math.log10(least))
  step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _format(is_share: bool) -> Format:
  return functools.partial(percent, digits=0) if is_share else number


def _y_ticks(series: Sequence[Series], anchors: Sequence[float]) -> list[float]:
  """Ticks that enclose all points, intervals and anchors."""
  points = [y for line in series for segment in line.segments for _, y in segment]
  bounds = [bound for line in series for interval in line.intervals for bound in interval]
  values = [value for value in (*points, *bounds, *anchors) if value is not None]
  low, high = min(values), max(values)
  if low == high:
    margin = abs(low) / 10 or 1.0
    low, high = low - margin, high + margin
  return nice_ticks(low, high)


def _tick_labels(ticks: Sequence[float], is_share: bool) -> list[str]:
  """The ticks with as many decimals as their distance needs: 0, 0.5 and 1 are 0.0, 0.5 and 1.0."""
  scale, suffix = (100, "%") if is_share else (1, "")
  decimals = max(0, -math.floor(math.log10((ticks[1] - ticks[0]) * scale) + 1e-9))
  return [f"{tick * scale:,.{decimals}f}{suffix}" for tick in ticks]


def _means(segment: Sequence[Point], size: int) -> list[Point]:
  chunks = [segment[start : start + size] for start in range(0, len(segment), size)]
  return [(_mean([x for x, _ in chunk]), _mean([y for _, y in chunk])) for chunk in chunks]


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known else None


def _describe(series: Sequence[Series], format: Format) -> str:
  sentences = []
  for line in series:
    values = [y for segment in line.segments for _, y in segment if y is not None]
    if values:
      begin, end, low, high = map(format, (values[0], values[-1], min(values), max(values)))
      sentences.append(f"{line.label}: from {begin} to {end}, between {low} and {high}.")
  return " ".join(sentences)


def _axes(svg: Element, frame: _Frame, x_ticks: Mapping[float, str], name: str, is_share: bool) -> None:
  for tick, label in zip(frame.y_ticks, _tick_labels(frame.y_ticks, is_share), strict=True):
    y = frame.y(tick)
    add(svg, "line", "grid-line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y)
    add(svg, "text", text=label, x=_LEFT - 7, y=y + 4, text_anchor="end")
  for tick, label in x_ticks.items():
    add(svg, "text", text=label, x=frame.x(tick), y=_HEIGHT - _BOTTOM + 17, text_anchor="middle")
  add(svg, "text", "name", name, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, text_anchor="middle")


def _round_boundaries(svg: Element, frame: _Frame, boundaries: Mapping[int, float]) -> None:
  if len(boundaries) == 1:
    return
  places = [frame.x(step) for step in boundaries.values()]
  for round, x, end in zip(boundaries, places, [*places[1:], _WIDTH], strict=True):
    add(svg, "line", "boundary", x1=x, x2=x, y1=_TOP - 12, y2=_HEIGHT - _BOTTOM)
    fitting = [label for label in (f"round {round}", str(round)) if 4 + _CHARACTER * len(label) < end - x]
    add(svg, "text", "name", fitting[0] if fitting else "", x=x + 4, y=_TOP - 3)


def _polylines(svg: Element, frame: _Frame, line: Series) -> None:
  for segment in line.segments:
    for known, group in itertools.groupby(segment, key=lambda point: point[1] is not None):
      points = [(frame.x(x), frame.y(y)) for x, y in group] if known else []
      if len(points) == 1:
        add(svg, "circle", f"dot {line.style}", cx=points[0][0], cy=points[0][1], r=3)
      elif points:
        add(svg, "polyline", f"line {line.style}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _dots(svg: Element, frame: _Frame, line: Series, format: Format, *, labelled: bool) -> None:
  points = [(x, y) for segment in line.segments for x, y in segment if y is not None]
  for (x, y), (_, following) in zip(points, [*points[1:], (0, -math.inf)], strict=True):
    dot = add(svg, "circle", f"dot {line.style}", cx=frame.x(x), cy=frame.y(y), r=4)
    add(dot, "title", text=f"{line.label}, round {x:g}: {format(y)}")
    if labelled:
      # On the side of the line that it leaves free: below one that rises, above one that falls.
      add(svg, "text", "value", format(y), x=frame.x(x) + 8, y=frame.y(y) + (15 if following > y else -6))


def _error_bars(svg: Element, frame: _Frame, line: Series) -> None:
  for (round, _), (low, high) in zip(line.segments[0], line.intervals, strict=False):
    if low is not None and high is not None:
      x, bottom, top = frame.x(round), frame.y(low), frame.y(high)
      ends = "".join(f"M{x - 6:.1f} {y:.1f}h12" for y in (bottom, top))
      add(svg, "path", f"error {line.style}", d=f"M{x:.1f} {bottom:.1f}V{top:.1f}{ends}")


def _bar(svg: Element, x: float, y: float, pieces: Sequence[tuple[str, float, str]]) -> float:
  """Where a bar of (tooltip, width, CSS classes) that begins at x ends."""
  for tooltip, width, style in pieces:
    if width:
      # A gap of a hairline parts the pieces, but never hides a thin one.
      piece = add(svg, "rect", style, x=x, y=y, width=max(width - 1, 0.5), height=22)
      add(piece, "title", text=tooltip)
    x += width
  return x


def _legend_places(labels: Sequence[str]) -> list[tuple[int, float]]:
  """(line, x) of each label, from left to right, on as many lines as it takes."""
  places, line, x = [], 0, 0.0
  for label in labels:
    width = 34 + _CHARACTER * len(label)
    if x and x + width > _WIDTH:
      line, x = line + 1, 0.0
    places.append((line, x))
    x += width
  return places


def _legend(svg: Element, series: Sequence[Series], reference: Reference | None) -> None:
  entries = [(line.label, f"line {line.style}") for line in series] if len(series) > 1 else []
  entries += [(reference[1], "reference")] if reference else []
  for (label, style), (_, x) in zip(entries, _legend_places([label for label, _ in entries]), strict=True):
    add(svg, "line", style, x1=x + 2, x2=x + 17, y1=7, y2=7)
    add(svg, "text", text=label, x=x + 22, y=11)

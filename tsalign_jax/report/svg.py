"""SVG as a tree of elements, so that a drawing is well-formed and every text in it is escaped."""

from xml.etree import ElementTree

Element = ElementTree.Element


def drawing(title: str, description: str, width: float, height: float) -> Element:
  """An empty drawing that a screen reader announces by its title and description."""
  label = f"{title}. {description}"
  size = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label}
  svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
  add(svg, "title", text=title)
  add(svg, "desc", text=description)
  return svg


def add(parent: Element, tag: str, style: str = "", text: str | None = None, **attributes: float | str) -> Element:
  """A new last child: `style` is its CSS class, and `text_anchor="end"` becomes `text-anchor="end"`."""
  named = {key.replace("_", "-"): _written(value) for key, value in attributes.items()}
  child = ElementTree.SubElement(parent, tag, named | ({"class": style} if style else {}))
  child.text = text
  return child


def to_string(svg: Element) -> str:
  """The drawing as XML, to be put into a page."""
  return ElementTree.tostring(svg, encoding="unicode")


def _written(value: float | str) -> str:
  return value if isinstance(value, str) else f"{value:.1f}"

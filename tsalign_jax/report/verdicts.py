"""What `tsalign verdicts` shows of a run: how the teacher judged, and what that cost."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich import box
from rich.markup import escape
from rich.table import Table

from tsalign_jax.data.tables import Rows, read_table
from tsalign_jax.nested import walk
from tsalign_jax.report.load import read_configuration, round_folders
from tsalign_jax.report.words import percent
from tsalign_jax.teachers import ledger
from tsalign_jax.teachers.statistics import Judged, by_member, statistics
from tsalign_jax.teachers.store import STORE, Scored, scored
from tsalign_jax.types import UserError, Verdict

PAIRS, HELD_OUT, ALL = "pairs", "held out", "all"  # two kinds of verdicts: what comes first is another thing in each
_COUNTS = {Verdict.FIRST: "1st", Verdict.SECOND: "2nd", Verdict.TIE: "tie", Verdict.INCONSISTENT: "incon-\nsistent"}
_COUNTS |= {Verdict.ERROR: "error"}
_SHARES = {"orders_agree": "orders\nagree", "first_slot_wins": "slot A\nwins", "longer_wins": "longer\nwins"}
_SHARES |= {"agreement": "members\nagree"}
_MEANING = (
  "1st: the student's pick of mined pairs, and the aligned policy's answer where it is held out. In %: orders agree, "
  "of pairs asked in both; slot A wins, of answers that prefer a side (50 is fair); longer wins, of decided pairs."
)


def verdict_tables(run: Path) -> list[Table]:
  """Verdicts by stage, for the teacher and for each member of an ensemble; what was scored; a bill of what was paid.

  Raises UserError for a folder without a run, or one in which nothing was judged yet.
  """
  configuration = yaml.safe_load(read_configuration(run)) or {}
  kinds, bill = {PAIRS: _pairs(run), HELD_OUT: _comparisons(run)}, ledger.accounts(run / ledger.FILE)
  scores = {store: found for store in (run / STORE, *_shared_stores(configuration)) if (found := scored(store))}
  sets: dict[str, list[Judged]] = {}
  members: dict[str, list[Judged]] = {}
  for kind, judged in kinds.items():
    everything = [each for part in judged.values() for each in part]
    sets |= judged | ({f"{ALL} {kind}": everything} if everything else {})
    members |= {f"{name}, {kind}": theirs for name, theirs in by_member(everything).items()}
  if not (sets or bill or scores):
    raise UserError(f"{run}: nothing has been judged yet")
  tables = [_verdicts(sets, f"Verdicts of {escape(_teacher(run))}")] if sets else []
  if members:
    tables.append(_verdicts(members, "Verdicts of its members"))
  if others := _others(run):
    tables.append(_verdicts(others, "Verdicts of further judges"))
  if tables:
    tables[-1].caption = _MEANING
  own = run / STORE
  tables += [_scores(found, "" if store == own else f" in all runs with {store}") for store, found in scores.items()]
  return [*tables, _bill(bill)] if bill else tables


def _pairs(run: Path) -> dict[str, list[Judged]]:
  """Verdicts on the candidate pairs of every round."""
  return {
    f"round {number}" if number else "warm start": _of_round(folder)
    for number, folder in round_folders(run)
    if (folder / "verdicts.parquet").is_file()
  }


def _comparisons(run: Path) -> dict[str, list[Judged]]:
  """Verdicts on the held-out comparisons of every round."""
  files = {number: folder / "comparisons.parquet" for number, folder in round_folders(run)}
  return {
    f"round {number} {HELD_OUT}": [_of_row(row, row["policy"], row["base"]) for row in read_table(file)]
    for number, file in files.items()
    if file.is_file()
  }


def _others(run: Path) -> dict[str, list[Judged]]:
  """Verdicts of each further judge on held-out comparisons, by round; their evidence is not kept."""
  sets: dict[str, list[Judged]] = {}
  for number, folder in round_folders(run):
    file = folder / "comparisons.parquet"
    for row in read_table(file) if file.is_file() else ():
      for name, verdict in json.loads(row["others"] or "{}").items():
        judged = Judged(row["policy"], row["base"], Verdict(verdict), {})
        sets.setdefault(f"{name}, round {number}", []).append(judged)
  return sets


def _of_round(folder: Path) -> list[Judged]:
  texts = {(row["prompt_id"], row["response_id"]): row["text"] for row in read_table(folder / "responses.parquet")}
  rows: Rows = read_table(folder / "verdicts.parquet")
  return [_of_row(row, texts[row["prompt_id"], row["first"]], texts[row["prompt_id"], row["second"]]) for row in rows]


def _of_row(row: dict, first: str, second: str) -> Judged:
  return Judged(first, second, Verdict(row["verdict"]), json.loads(row["evidence"]))


def _teacher(run: Path) -> str:
  file = run / "teachers.json"
  return json.loads(file.read_text())["teacher"] if file.is_file() else "the teacher"


def _shared_stores(configuration: dict) -> list[Path]:
  """The stores that the run's teachers share with other runs: whatever is called `store` in its configuration.

  What goes to a server as it is (`extra_body`) may have a field of that name too.
  """
  everything = walk(configuration, but="extra_body")
  return sorted({Path(value) for name, value in everything if name == "store" and value})


def _verdicts(sets: dict[str, list[Judged]], title: str) -> Table:
  found = {name: statistics(judged) for name, judged in sets.items()}
  known = [share for share in _SHARES if any(share in each.shares() for each in found.values())]
  table = _table(title, ["", "pairs", *_COUNTS.values(), *(_SHARES[share] for share in known)])
  for name, each in found.items():
    counts, shares = (each.counts[verdict] for verdict in _COUNTS), (getattr(each, share) for share in known)
    table.add_row(escape(name), str(each.pairs), *map(str, counts), *map(_points, shares))
    if name.startswith(ALL):
      table.add_row("  in %", "", *(_points(each.counts[verdict] / each.pairs) for verdict in _COUNTS))
  return table


def _points(share: float | None) -> str:
  return percent(share, 0).rstrip("%")


def _scores(scores: Sequence[Scored], where: str) -> Table:
  table = _table(
    f"Responses scored by reward models{escape(where)}", ["", "responses", "tokens", "cut", "seconds", "responses/s"]
  )
  for each in scores:
    speed = each.responses / each.seconds if each.seconds else 0.0
    counts = (f"{count:,}" for count in (each.responses, each.tokens, each.cut))
    table.add_row(escape(each.teacher), *counts, f"{each.seconds:,.1f}", f"{speed:,.1f}")
  table.caption = "Each response to a prompt once, with compilation; cut: longer than what the model reads."
  return table


def _bill(bill: Sequence[ledger.Account]) -> Table:
  table = _table("Requests and cost", ["", "requests", "input\ntokens", "output\ntokens", "cost"])
  for teacher in dict.fromkeys(each.teacher for each in bill):
    theirs = [each for each in bill if each.teacher == teacher]
    table.add_row(escape(teacher), *_sums(theirs))
    for each in theirs:
      table.add_row(f"  {each.outcome}", *_sums([each]), style="dim")
  table.caption = "A request whose tokens nobody counted costs the most that it can have cost."
  return table


def _sums(accounts: Sequence[ledger.Account]) -> list[str]:
  counts = [sum(getattr(each, name) for each in accounts) for name in ("requests", "input_tokens", "output_tokens")]
  return [*(f"{count:,}" for count in counts), f"{sum(each.cost for each in accounts):,.4f}"]


def _table(title: str, headings: Sequence[str]) -> Table:
  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, title=title)
  table.title_justify = table.caption_justify = "left"
  for index, heading in enumerate(headings):
    table.add_column(heading, justify="right" if index else "left", no_wrap=True)
  return table

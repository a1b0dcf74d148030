"""What `tsalign verdicts` prints."""

import asyncio
import contextlib
import json
import sqlite3
from io import StringIO

import pytest
import yaml
from rich.console import Console
from stages import judging
from teachers.asked import pair

from tsalign_jax.data.tables import COMPARISONS, VERDICTS, write_table
from tsalign_jax.report.verdicts import verdict_tables
from tsalign_jax.teachers.ledger import FILE, Ledger, Outcome
from tsalign_jax.teachers.store import STORE, Price, Score, ScoreStore
from tsalign_jax.types import UserError


def verdict(number, verdict, *slots, **evidence):
  evidence |= {"answers": [{"slot": slot} for slot in slots]} if slots else {}
  row = {"prompt_id": number, "first": 0, "second": 1, "verdict": verdict, "probability": None}
  return row | {"evidence": json.dumps(evidence)}


def comparison(number, verdict):
  texts = {"prompt": [], "base": "short", "policy": "long response"}
  return {"prompt_id": number, "response_id": 0, **texts, "verdict": verdict, "evidence": "{}"}


@pytest.fixture
def run(tmp_path):
  (tmp_path / "config.yaml").write_text("run: x\n")
  for name in ("round_00", "round_01"):
    judging.write_inputs(tmp_path / name, [pair(1, 2, 0), pair(200, 1, 1), pair(3, 3, 2)])
  rows = [verdict(0, "second", "B", "A"), verdict(1, "inconsistent", "A", "A"), verdict(2, "tie")]
  write_table(tmp_path / "round_00" / "verdicts.parquet", rows, VERDICTS)
  write_table(tmp_path / "round_01" / "verdicts.parquet", [verdict(1, "first", "A", "B")], VERDICTS)
  table = [comparison(0, "first"), comparison(1, "second"), comparison(2, "error")]
  write_table(tmp_path / "round_01" / "comparisons.parquet", table, COMPARISONS)
  return tmp_path


def lines(run) -> list[list[str]]:
  console = Console(width=80, file=StringIO(), color_system=None)
  for table in verdict_tables(run):
    console.print(table)
  printed = [line.rstrip() for line in console.file.getvalue().splitlines()]
  assert all(len(line) <= 80 for line in printed)
  return [line.split() for line in printed]


def test_counts_and_shares_of_every_stage(run):
  printed = lines(run)
  #        pairs 1st 2nd tie inconsistent error, orders agree, slot A, longer
  assert ["warm", "start", "3", "0", "1", "1", "1", "0", "50", "75", "–"] in printed
  assert ["round", "1", "1", "1", "0", "0", "0", "0", "100", "50", "100"] in printed
  assert ["round", "1", "held", "out", "3", "1", "1", "0", "0", "1", "–", "–", "50"] in printed
  assert ["all", "pairs", "4", "1", "1", "1", "1", "0", "67", "67", "100"] in printed
  assert ["all", "held", "out", "3", "1", "1", "0", "0", "1", "–", "–", "50"] in printed
  assert ["in", "%", "25", "25", "25", "25", "0"] in printed and ["in", "%", "33", "33", "0", "0", "33"] in printed
  assert "Requests" not in str(printed)


def test_teacher_is_named_and_members_have_their_own_lines(run):
  (run / "teachers.json").write_text(json.dumps({"teacher": "ensemble [x]"}))
  members = [{"teacher": f"judge [{n}]", "verdict": v, "evidence": {}} for n, v in enumerate(["first", "second"])]
  rows = [verdict(1, "inconsistent", agreement=0.0, members=members)]
  write_table(run / "round_01" / "verdicts.parquet", rows, VERDICTS)
  printed = lines(run)
  assert ["Verdicts", "of", "ensemble", "[x]"] in printed
  assert ["judge", "[0],", "pairs", "1", "1", "0", "0", "0", "0", "100"] in printed
  assert ["judge", "[1],", "pairs", "1", "0", "1", "0", "0", "0", "0"] in printed


def test_further_judges_have_their_own_lines(run):
  table = [comparison(0, "first"), comparison(1, "second"), comparison(2, "error")]
  found = [{"gold": "second"}, {"gold": "error"}, {"gold": "inconsistent"}]
  table = [row | {"others": json.dumps(others)} for row, others in zip(table, found, strict=True)]
  write_table(run / "round_01" / "comparisons.parquet", table, COMPARISONS)
  printed = lines(run)
  assert ["Verdicts", "of", "further", "judges"] in printed
  assert ["gold,", "round", "1", "3", "0", "1", "0", "1", "1", "0"] in printed
  assert ["all", "held", "out", "3", "1", "1", "0", "0", "1", "–", "–", "50"] in printed  # the teacher's alone


def test_reward_models_have_a_table_of_what_they_scored(run):
  store = ScoreStore(run / STORE)
  store.put("reward_model [x]", {"a": Score(1.5, 900, False, 0.5), "b": Score(-1.0, 334, True, 0.25)})
  store.put("reward_model y", {"c": Score(2.0, 7, False, 0.0)})
  store.close()
  printed = lines(run)
  assert ["reward_model", "[x]", "2", "1,234", "1", "0.8", "2.7"] in printed
  assert ["reward_model", "y", "1", "7", "0", "0.0", "0.0"] in printed


def test_scores_in_a_store_that_runs_share_are_shown_as_such(run, tmp_path):
  shared = tmp_path / "shared.sqlite"
  store = ScoreStore(shared)
  store.put("reward_model [x]", {"a": Score(1.5, 900, False, 0.5)})
  store.close()
  config = {"run": "x", "teacher": {"members": [{"kind": "checks"}, {"kind": "reward_model", "store": str(shared)}]}}
  config["evaluation"] = {"judges": {"gold": {"kind": "llm_judge", "extra_body": {"store": True}}}}
  (run / "config.yaml").write_text(yaml.safe_dump(config))
  printed = " ".join(" ".join(line) for line in lines(run))
  assert (
    "Responses scored by reward models in all runs with" in printed and "reward_model [x] 1 900 0 0.5 2.0" in printed
  )


async def spend(file):
  ledger = Ledger(file, "judge", 10.0, lambda: 0.0)
  for price in (Price(100, 10, 0.25), Price(200, 20, 0.5)):
    ledger.settle(await ledger.reserve("k", 1.0), Outcome.ANSWERED, price)
  await ledger.reserve("k", 2.0)
  ledger.close()


@pytest.mark.parametrize("judged", [True, False])
def test_bill_shows_requests_tokens_and_cost_also_before_anything_is_judged(run, judged, tmp_path):
  folder = run if judged else tmp_path / "early"
  folder.mkdir(exist_ok=True)
  (folder / "config.yaml").write_text("run: x\n")
  asyncio.run(spend(folder / FILE))
  printed = lines(folder)
  assert ["judge", "3", "300", "30", "2.7500"] in printed
  assert ["answered", "2", "300", "30", "0.7500"] in printed and ["sent", "1", "0", "0", "2.0000"] in printed
  assert "the most that it can have cost" in " ".join(" ".join(line) for line in printed)


def test_files_of_a_run_that_was_killed_as_it_made_them_hold_nothing(tmp_path):
  (tmp_path / "config.yaml").write_text("run: x\n")
  for name in (FILE, STORE):
    with contextlib.closing(sqlite3.connect(tmp_path / name)) as half:
      half.execute("PRAGMA journal_mode = WAL")
  with pytest.raises(UserError, match="nothing has been judged yet"):
    verdict_tables(tmp_path)


def test_run_without_verdicts_is_said_so(tmp_path):
  (tmp_path / "config.yaml").write_text("run: x\n")
  with pytest.raises(UserError, match="nothing has been judged yet"):
    verdict_tables(tmp_path)

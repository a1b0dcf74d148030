"""The HTML report and the closing table, from fabricated run folders."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
from report.fabricate import NASTY, VERDICTS, fabricate, round_metrics, write_comparisons, write_steps
from rich.console import Console

from tsalign_jax.export import export_model
from tsalign_jax.report import charts
from tsalign_jax.report.answers import apportion, fair_sample
from tsalign_jax.report.html import write_report
from tsalign_jax.report.load import load_comparisons, load_run
from tsalign_jax.report.table import closing_table
from tsalign_jax.report.verdicts import verdict_tables
from tsalign_jax.types import UserError, Verdict


def page(run: Path) -> str:
  return write_report(run).read_text(encoding="utf-8")


def words(html: str) -> str:
  """What a reader sees of a page, with every run of white space as one space."""
  body = re.sub(r"<(style|title|desc)\b.*?</\1>", " ", html, flags=re.DOTALL)
  return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def drawings(html: str) -> list[str]:
  return re.findall(r"<svg\b.*?</svg>", html, flags=re.DOTALL)


def change_metrics(run: Path, number: int, **changes) -> None:
  tiny.change_json(run / f"round_{number:02d}" / "metrics.json", **changes)


def export_policy(run: Path) -> None:
  export_model(run, run / "out", round=None, student=False, dtype="float32")


def printed(run: Path, width: int = 80) -> list[str]:
  console = Console(width=width, file=StringIO(), color_system=None)
  console.print(closing_table(run))
  return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("rounds", [1, 3])
def test_report_shows_the_numbers_of_every_round(tmp_path, rounds):
  seen = words(page(fabricate(tmp_path / "run", rounds, win_rate=0.6)))
  for number in range(1, rounds + 1):
    metrics = round_metrics(number, 0.6 + 0.04 * (number - 1))
    low, high = metrics["win_rate_ci"]
    assert f"{100 * low:.1f}% to {100 * high:.1f}%" in seen
    assert f"{metrics['wins']} / 30 / {metrics['losses']} / {metrics['undecided']}" in seen
    assert f"142 → {metrics['mean_length_policy']:.0f}" in seen
    assert f"{metrics['pairs']:,}" in seen
    assert f"64% → {100 * metrics['student_accuracy_random']['now']:.0f}%" in seen
    assert f"{100 * metrics['student_accuracy_random']['now']:.1f}% (61.2% to 73.3%) of 471" in seen
  assert f"after round {rounds}" in seen and "128 held-out prompts" in seen and "256 comparisons" in seen
  assert "dropped: same answer" in seen and "10.9 min" in seen and "23.7 min" in seen
  assert "max_tokens: 512" in seen
  unused = (
    "Prompts that no round uses: 2 training prompts (longer than 256 tokens), 1 training prompt (the prompt is held"
  )
  assert unused in seen


def test_regret_is_shown_also_where_nobody_asked_for_calibration(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  change_metrics(run, 1, student_calibration={})
  assert "Regret of the pick that began the round" in words(page(run)) and "the student is sure" not in words(page(run))


def test_comparisons_without_a_verdict_are_told_in_the_terminal_too(tmp_path):
  run = fabricate(tmp_path / "run", 2)
  assert "128 held-out prompts, 7 more undecided)" in " ".join(printed(run))


def test_report_shows_what_judges_find_that_labelled_nothing(tmp_path):
  run = fabricate(tmp_path / "run", 2)
  assert "labelled nothing" not in words(page(run)) + " ".join(printed(run))
  for number in (1, 2):
    opinion = {"win_rate": 0.5 + number / 40, "win_rate_ci": [0.487, 0.612], "undecided": 0}
    change_metrics(run, number, judges={"gold": opinion, "silver": opinion | {"undecided": 31 * number}})
  seen = words(page(run))
  assert "Further judges did not decide every comparison: silver left 62 undecided." in seen
  assert "55.0% (48.7% to 61.2%) by gold , which labelled nothing" in seen and "52.5% 48.7% to 61.2%" in seen
  assert "By judges that labelled nothing: 55.0% by gold, 55.0% by silver." in seen
  assert "By gold, which labelled nothing: 55.0 [48.7, 61.2]" in " ".join(printed(run))


def test_report_says_how_good_the_student_is(tmp_path):
  run = fabricate(tmp_path / "run", 2)
  seen = words(page(run))
  assert "1 67.1% (61.2% to 73.3%) of 471 61.3% (54.0% to 72.2%) of 117 21% → 17% 1.25 2.75 412 3.75" in seen
  assert "2 70.1% (61.2% to 73.3%) of 471 64.3% (54.0% to 72.2%) of 117 21% → 13% 2.25 3.75 412 3.75" in seen
  assert "After round 2, the student is sure 55.4% 87.1% and right 53.1% 88.0% pairs 301 1,207" in seen
  change_metrics(run, 2, student_regret=None, pairs_per_second={"student": 9.0, "teacher": None})
  assert "of 117 21% → 13% – – 9 –" in words(page(run))
  change_metrics(run, 2, student_calibration=None)
  assert "How good is the student?" not in words(page(run))


@pytest.mark.parametrize(
  ("win_rate", "sentence"),
  [
    (0.60, "The aligned policy beats the base policy"),
    (0.52, "No measurable difference from the base policy"),
    (0.40, "The aligned policy loses to the base policy"),
  ],
)
def test_headline_claims_a_difference_only_if_the_interval_excludes_half(tmp_path, win_rate, sentence):
  run = fabricate(tmp_path / "run", 1, win_rate=win_rate)
  seen = words(page(run))
  assert sentence in seen
  assert ("includes 50%" in seen) == (win_rate == 0.52)
  assert sentence in " ".join(printed(run))


def test_caveats_name_longer_answers_a_better_round_and_failed_judgements(tmp_path):
  run = fabricate(tmp_path / "run", 3, win_rate=0.6)
  change_metrics(run, 2, win_rate=0.7)
  write_comparisons(run / "round_03", ["first"] * 5 + ["inconsistent"] * 2 + ["error"])
  seen = words(page(run))
  assert "19% longer: 169 tokens against 142" in seen
  assert "Round 2 scored higher (70.0%)" in seen
  assert "Of 8 comparisons, 2 inconsistent" in seen and "1 not judged" in seen
  assert "not finished" not in seen
  change_metrics(run, 3, mean_length_policy=143.0)
  assert "about as long as before" in words(page(run))


def test_responses_that_the_student_read_in_part_are_a_caveat(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  assert "start of their prompt" not in words(page(run))
  change_metrics(run, 1, student_cut=17, student_scored=1024)
  assert "The student scored 17 of 1,024 responses of the last round without the start" in words(page(run))


def test_a_run_that_is_not_finished_is_a_caveat(tmp_path):
  assert "2 of 3 rounds are" in words(page(fabricate(tmp_path / "run", 2, win_rate=0.6)))


def test_everything_from_a_run_is_escaped(tmp_path):
  run = fabricate(tmp_path / NASTY.replace("/", "|"), 1)
  change_metrics(run, 1, dropped={"<img src=x>": 3}, seconds={"<b>align</b>": 3.0})
  config = run / "config.yaml"
  config.write_text(config.read_text() + "note: <i>config</i>\n")
  html = page(run)
  assert "<script" not in html and "<img" not in html and "<b>" not in html and "<i>" not in html
  assert "Tea &amp; &lt;script&gt;alert(&#34;tea&#34;)&lt;/script&gt;" in html
  assert "&lt;i&gt;config&lt;/i&gt;" in html


def test_report_loads_nothing(tmp_path):
  html = page(fabricate(tmp_path / "run", 3))
  assert not re.findall(r"https?://", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))
  assert not re.findall(r"@import|url\(|\bsrc=", html)
  assert re.findall(r'href="([^"]*)"', html) == ["data:,"]


def test_tags_are_balanced(tmp_path):
  class Balance(HTMLParser):
    void = frozenset(["meta", "link"])

    def __init__(self):
      super().__init__()
      self.open = []

    def handle_starttag(self, tag, attributes):
      if tag not in self.void:
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
      pass

    def handle_endtag(self, tag):
      assert self.open.pop() == tag

  for rounds in (0, 1, 3, 5):
    balance = Balance()
    balance.feed(page(fabricate(tmp_path / str(rounds), rounds)))
    assert balance.open == []


def test_drawings_are_xml_with_a_title_and_a_description(tmp_path):
  found = drawings(page(fabricate(tmp_path / "run", 3)))
  assert len(found) == 16  # the verdicts, 6 charts by round, 6 of align, 2 of distil, the time
  for drawing in found:
    title, description = list(ElementTree.fromstring(drawing))[:2]
    assert title.tag.endswith("title") and title.text
    assert description.tag.endswith("desc") and description.text


def test_error_bars_span_the_interval_and_half_is_marked(tmp_path):
  html = page(fabricate(tmp_path / "run", 3))
  chart = next(drawing for drawing in drawings(html) if "Win rate against the base policy, by round" in drawing)
  assert chart.count('class="error strong"') == 3
  assert chart.count('class="reference"') == 2  # the line and its entry in the legend
  assert "50%: no difference" in chart


def test_before_the_first_round_has_finished_the_page_says_so(tmp_path):
  run = fabricate(tmp_path / "run", 0)
  seen = words(page(run))
  assert "No round has finished yet" in seen and "Before you trust it" not in seen
  (run / "round_01").mkdir()
  write_steps(run / "round_01", 1, 5)
  with (run / "round_01" / "align.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')  # the stage is writing this line
  html = page(run)
  assert "Round 1 is under way" in words(html) and "Reward margins" in words(html)
  assert len(load_run(run).rounds[0].align) == 5


def test_the_preparation_is_not_a_round_under_way(tmp_path):
  run = fabricate(tmp_path / "run", 0)
  (run / "round_00").mkdir()
  write_steps(run / "round_00", 0, 5)
  (run / "round_00" / "align.jsonl").unlink()
  seen = words(page(run))
  assert "The run is being prepared" in seen and "Round 0 is the warm start" in seen
  assert "under way" not in seen and "Reward margins" not in seen


def test_missing_numbers_and_charts_are_left_out(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  metrics = {"round": 1, "win_rate": 0.6, "win_rate_ci": [0.55, 0.65], "kl_from_initial": float("nan")}
  (run / "round_01" / "metrics.json").write_text(json.dumps(metrics))
  for name in ("comparisons.parquet", "align.jsonl", "distil.jsonl"):
    (run / "round_01" / name).unlink()
  html = page(run)
  assert "nan" not in words(html).lower()
  assert len(drawings(html)) == 2  # the verdicts and the win rate
  assert "–" in "".join(printed(run))


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"config\.yaml"):
    write_report(tmp_path)
  assert not (tmp_path / "report.html").exists()


def test_sample_of_answers_is_deterministic_proportional_and_ignores_file_order(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  comparisons = load_comparisons(load_run(run).rounds[0])
  sample = fair_sample(comparisons, 10)
  assert sample == fair_sample(comparisons[::-1], 10)
  verdicts = [item.verdict for item in sample]
  assert [verdicts.count(verdict) for verdict in (Verdict.FIRST, Verdict.TIE, Verdict.SECOND)] == [6, 1, 3]
  assert verdicts != sorted(verdicts, key=list(Verdict).index)
  assert len(fair_sample(comparisons[:4], 10)) == 4
  seen = words(page(run))
  assert "10 of 100 comparisons" in seen and "aligned better 6 of 61, tie 1 of 12, base better 3 of 27" in seen


def test_sample_does_not_look_at_the_answers(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  before = fair_sample(load_comparisons(load_run(run).rounds[0]), 10)
  write_comparisons(run / "round_01", VERDICTS, answer="something else")
  after = fair_sample(load_comparisons(load_run(run).rounds[0]), 10)
  ids = [[(item.prompt_id, item.response_id) for item in sample] for sample in (before, after)]
  assert before != after and ids[0] == ids[1]


@pytest.mark.parametrize(
  ("counts", "seats"),
  [([61, 12, 27], [6, 1, 3]), ([5, 5, 5], [4, 3, 3]), ([99, 1], [10, 0]), ([3, 2], [3, 2]), ([], [])],
)
def test_seats_are_apportioned_by_largest_remainder(counts, seats):
  assert list(apportion(dict(zip(Verdict, counts, strict=False)), 10).values()) == seats


def test_failed_checks_are_shown_where_the_evidence_has_them(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  write_comparisons(run / "round_01", ["first"])
  assert "failed: no_commas" in words(page(run)) and "passed every check" in words(page(run))


@pytest.mark.parametrize("number", [0.0, 0.0312, 4.56, 78.94, 1234.4, None])
def test_a_single_value_makes_a_chart(number):
  series = [charts.Series("value", [[(1, number), (2, 1.0)]])]
  ElementTree.fromstring(charts.by_round("Value", series))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.19, 0.27), (-212.3, -181.0), (3e-6, 5e-6), (0, 9000)])
def test_ticks_enclose_the_values(low, high):
  ticks = charts.nice_ticks(low, high)
  assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 7


def test_long_series_are_averaged_within_their_round_and_the_chart_says_so():
  segments = [[(step, float(round)) for step in range(600 * round, 600 * round + 600)] for round in range(2)]
  chart = charts.by_step("Loss", [charts.Series("loss", segments)], boundaries={1: 0, 2: 600})
  assert "each point is the mean of 5" in chart
  heights = [{point.split(",")[1] for point in line.split()} for line in re.findall(r'points="([^"]*)"', chart)]
  assert [len(levels) for levels in heights] == [1, 1] and heights[0] != heights[1]


@pytest.mark.parametrize("rounds", [1, 3])
def test_table_fits_and_shows_every_round(tmp_path, rounds):
  run = fabricate(tmp_path / "run", rounds, win_rate=0.6)
  lines = printed(run)
  assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
  assert sum("142→1" in line for line in lines) == rounds
  assert any("60.0 [53.9, 66.1]" in line and "139/30/87" in line and "64→67" in line for line in lines)


def test_table_fits_with_all_that_three_digits_can_hold(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  sure = {"initial": 1.0, "now": 1.0}
  counts = {"wins": 512, "ties": 128, "losses": 384, "mean_length_base": 512.0, "mean_length_policy": 256.0}
  students = {"student_accuracy_random": sure, "student_accuracy_mined": sure}
  change_metrics(run, 1, **counts, **students, kl_from_initial=12.34, seconds={"align": 60 * 543.2})
  lines = printed(run)
  assert "…" not in "".join(lines)
  assert any(line.split()[-5:] == ["512→256", "100→100", "100→100", "12.3", "543"] for line in lines)


def test_table_fits_with_large_numbers(tmp_path):
  run = fabricate(tmp_path / "run", 1)
  large = {"wins": 1400, "ties": 3000, "losses": 1860, "mean_length_base": 1024.0, "mean_length_policy": 1311.0}
  change_metrics(run, 1, pairs=123456, kl_from_initial=123.4, seconds={"align": 60 * 1234.5}, **large)
  lines = printed(run, width=100)
  assert max(map(len, lines)) <= 100 and "…" not in "".join(lines)
  assert any("1400/3000/1860" in line and "1024→1311" in line and line.split()[-1] == "1234" for line in lines)


def test_table_of_an_unfinished_run_says_so(tmp_path):
  assert "No round has finished yet." in "".join(printed(fabricate(tmp_path / "run", 0)))


@pytest.mark.parametrize("command", [write_report, verdict_tables, export_policy])
def test_a_training_of_a_reward_model_is_no_run_of_rounds(command, tmp_path):
  (tmp_path / "config.yaml").write_text("run: x\nmodel: {path: y}\npairs: {train: [a], heldout: b}\n")
  with pytest.raises(UserError, match=r"a reward model was trained here, without rounds; it is in .*model"):
    command(tmp_path)
  with pytest.raises(UserError, match=r"not the folder of a run"):
    command(tmp_path / "nowhere")

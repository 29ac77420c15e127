"""The page about runs: what it shows, and that nothing a run says becomes markup."""

import html.parser
import json
import math
import re

import pytest
from runs import rl_config, sft_config

from regrpo.cli import main
from regrpo.rl import run_rl
from regrpo.run_page import load_runs, means, page, read_log, smooth, ticks, value_range, write_page
from regrpo.sft import run_sft

VOID = {"meta", "input", "line", "polyline"}
EVIL = "</script></style><script>alert(\"x\")</script> & \u2028 <b onclick='y'> ]]> {0} %s"


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order, and gathers them and their text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data

    def find(self, tag, **attrs):
        return [a for t, a in self.elements if t == tag and attrs.items() <= a.items()]


def write_run(folder, metrics, groups=(), config=None):
    folder.mkdir(parents=True)
    lines = (json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(metrics))
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


def group(step, says="text", advantages=(0.5, -0.5)):
    return {
        "step": step,
        "task": {"id": says, "family": says, "question": says, "expected": says},
        "error_type": says,
        "context": says,
        "trajectories": [
            {
                "success": advantage > 0,
                "reward": advantage,
                "advantage": advantage,
                "segments": [
                    {"segment": kind, "tokens": 2, "text": says}
                    for kind in ("action", "observation", "reflection")
                ],
            }
            for advantage in advantages
        ],
    }


def test_nothing_that_a_run_says_becomes_markup(tmp_path):
    folder = tmp_path / "<img src=x>"
    path = write_run(folder, [{"loss": 1.0, EVIL: 2.0}], [group(0, EVIL)], {"model": EVIL})
    shown = Page(page(load_runs([path])))
    assert len(shown.find("script")) == 2
    assert not shown.find("img")
    assert not shown.find("b", onclick="y")
    assert "alert" not in shown.text["script"].replace(
        json.dumps(EVIL)[1:-1].replace("<", "\\u003c"), ""
    )
    assert shown.text["span"].count(EVIL) == 2 * 3
    assert EVIL in shown.text["pre"]
    assert shown.text["h3"] == EVIL
    assert "<img src=x>" in shown.text["title"]
    data = json.loads(re.search(r'id="data">(.*)</script>', page(load_runs([path]))).group(1))
    assert data == {"loss": [[[0, 1.0]]], EVIL: [[[0, 2.0]]]}


def test_the_page_stands_alone(tmp_path):
    source = page(load_runs([write_run(tmp_path / "a", [{"loss": 1.0}], [group(0)])]))
    shown = Page(source)
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in shown.text["style"]
    assert not [a for _, a in shown.elements if {"src", "href"} & a.keys()]
    assert shown.text["script"].strip()


def test_curves_are_drawn_where_the_values_are(tmp_path):
    values = [0.0, 0.25, float("nan"), 0.5, 1.0]
    path = write_run(tmp_path / "a", [{"success": v} for v in values])
    source = page(load_runs([path]))
    assert "nan" not in source.lower().replace("answer", "")
    shown = Page(source)
    thin, bold = (a["points"].split() for a in shown.find("polyline"))
    xs, ys = zip(*(map(float, point.split(",")) for point in thin), strict=True)
    assert len(xs) == 4  # not the NaN
    assert xs == pytest.approx([52, 52 + 318 / 4, 52 + 318 * 3 / 4, 370], abs=0.1)
    assert ys == pytest.approx([166 - 156 * v for v in (0, 0.25, 0.5, 1)], abs=0.1)  # 0 to 1
    assert len(bold) == 4
    assert float(bold[-1].split(",")[1]) == pytest.approx(166 - 156 * 1.75 / 4, abs=0.1)
    (figure,) = shown.find("figure")
    assert (figure["data-low"], figure["data-high"]) == ("0", "4")


def test_runs_are_compared_and_may_differ_in_metrics_and_length(tmp_path):
    runs = [
        write_run(tmp_path / "a", [{"loss": 3.0}, {"loss": 2.0}], [group(0)], {"steps": 2}),
        write_run(tmp_path / "b", [{"loss": 1.0, "kl": 0.5}]),
    ]
    path = write_page(runs)
    assert path == tmp_path / "report.html"
    shown = Page(path.read_text())
    assert {f["data-metric"] for f in shown.find("figure")} == {"loss", "kl"}
    assert len(shown.find("input", **{"class": "run"})) == 2
    assert shown.text["label"].startswith(" a b")
    assert "2 of 2" in shown.text["td"]
    assert len({g["style"] for g in shown.find("g")}) == 2
    again = [write_run(tmp_path / x / "same", [{"loss": 1.0}]) for x in "xy"]
    assert [run.name for run in load_runs(again)] == again


def test_trajectories_carry_what_filters_and_colours_ask_for(tmp_path):
    groups = [group(0, advantages=(1.0, -0.25, 0.0)), group(10)]
    shown = Page(page(load_runs([write_run(tmp_path / "a", [{"loss": 1.0}], groups)])))
    assert [a["data-step"] for a in shown.find("article")] == ["0", "10"]
    members = [a for a in shown.find("details") if "member" in a.get("class", "")]
    assert [m["data-outcome"] for m in members[:3]] == ["success", "failure", "failure"]
    assert [m["style"] for m in members[:3]] == ["--share:1.000", "--share:0.500", "--share:0.000"]
    assert [m["class"] for m in members[:2]] == ["member good", "member bad"]
    for kind in ("action", "observation", "reflection"):
        assert len(shown.find("span", title=f"{kind}, 2 tokens")) == 5
    assert shown.text["option"] == "all010" + "allsuccessfailure" + "segmentadvantage"


def test_a_group_without_any_advantage(tmp_path):
    path = write_run(tmp_path / "a", [{"loss": 1.0}], [group(0, advantages=(0.0, 0.0))])
    assert Page(page(load_runs([path]))).text["span"].count("+0.000") == 2


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert read_log(log) == [{"step": 0, "loss": 1.0}]
    log.write_text('{"step": 0, "lo\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: .*expected JSON"):
        read_log(log)
    with pytest.raises(FileNotFoundError, match=r"none holds no metrics.jsonl"):
        load_runs([str(tmp_path / "none")])


def test_long_curves_are_shown_by_means():
    points = [(float(i), float(i % 2)) for i in range(1001)]
    short = means(points, 500)
    assert len(short) <= 500
    assert short[0] == (1.0, pytest.approx(1 / 3))
    assert short[-1][0] == pytest.approx(999.5)
    assert means([], 500) == smooth([]) == []
    assert means(points[:3], 500) == points[:3]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 3), (-0.9, 1.1), (1e-7, 3e-7), (5, 1e6), (-3e-4, -1e-4)]
)
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert all(low - 1e-9 * (high - low) <= m <= high + 1e-9 * (high - low) for m in marks)
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9)) in (1, 2, 5)


def test_a_constant_has_a_range_as_well():
    assert value_range("loss", [2.0, 2.0]) == (1.8, 2.2)
    assert value_range("loss", [0.0]) == (-1.0, 1.0)
    assert value_range("success", [0.4, 0.5]) == (0.0, 1.0)


def test_the_page_of_real_runs(base, tmp_path, environment, capsys):
    run_rl(rl_config(base, tmp_path / "rl", steps=3, log_trajectories_every=2), environment)
    run_sft(sft_config(base, tmp_path / "sft", steps=2))
    main(["report", str(tmp_path / "rl")])
    assert capsys.readouterr().out == f"page: {tmp_path / 'rl' / 'report.html'}\n"
    main(["report", str(tmp_path / "rl"), str(tmp_path / "sft"), "--out", str(tmp_path / "both")])
    for path, runs in ((tmp_path / "rl" / "report.html", 1), (tmp_path / "both", 2)):
        shown = Page(path.read_text())
        assert len(shown.find("input", **{"class": "run"})) == runs
        assert [a["data-step"] for a in shown.find("article")] == ["0", "0", "2", "2"]
        members = [a for a in shown.find("details") if "member" in a.get("class", "")]
        assert len(members) == 4 * 4
        metrics = {f["data-metric"] for f in shown.find("figure")}
        assert {"reward/mean", "success", "recovery", "reflection/rate", "loss"} <= metrics


def test_a_folder_without_a_run_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["report", str(tmp_path)])
    assert str(exit.value).startswith(f"regrpo report: {tmp_path} holds no metrics.jsonl")
    with pytest.raises(SystemExit):
        main(["report"])
    assert "runs" in capsys.readouterr().err

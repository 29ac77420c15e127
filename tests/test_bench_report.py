"""`python -m bench.report` on a small made-up run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cases, figures, report, tables

ROOT = Path(__file__).resolve().parent.parent


def record(op, provider, kind, seconds, **changes):
    linear = op.startswith("linear")
    return {
        "op": op,
        "shape": "8 x 100 x 4" if linear else "8 x 100",
        "tokens": 8,
        "vocab": 100,
        "dtype": "float32",
        "share": 1.0,
        "variant": "",
        "logits_bytes": 3200,
        "provider": provider,
        "kind": kind,
        "status": "ok",
        "note": "",
        "seconds": seconds,
        "median": seconds,
        "rounds": 3,
        "once": False,
        "extra": 0 if kind == "ours" else 64_000_000,
        "error": None,
        "traffic": 0 if linear else 2_000_000_000,
        "flops": 6_000_000_000_000 if linear else 0,
        "foreign_cores": 0.0,
        **changes,
    }


@pytest.fixture
def run():
    return {
        "format": tables.FORMAT,
        "machine": {
            "device": "cpu",
            "device_name": "A CPU",
            "threads": 2,
            "python": "3.11.0",
            "versions": {"torch": "2.13.0", "trl": None},
            "build": {"cpu_isa": "avx2", "cuda_architectures": None},
        },
        "load_at_start": 0.1,
        "load_at_end": 2.0,
        "foreign_cores": 0.05,
        "records": [
            record("grpo_loss", "ours cpu", "ours", 0.02),
            record("grpo_loss", "eager", "eager", 0.5),
            record("grpo_loss", "torch.compile", "torch.compile", 0.1),
            record(
                "grpo_loss",
                "trl",
                "peer",
                None,
                median=None,
                extra=None,
                status="failed",
                note="OutOfMemoryError: 5 | GB",
            ),
            record("grpo_loss", "copy", "floor", 0.03, traffic=6_000_000_000),
            record("linear_grpo_loss", "ours cpu", "ours", 2.0),
            record("linear_grpo_loss", "eager", "eager", 3.0),
            record("linear_grpo_loss", "3 GEMMs", "floor", 1.5),
        ],
        "left_out": {"16384 x 262144 float32": "needs at least 51.5 GB, may use 10.0"},
    }


@pytest.fixture
def written(run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": [], "regrpo": run}))
    return path


def cells(text, provider, op):
    """The row of a provider in the table of an op, by column."""
    lines = text.split(f"### {op}\n")[1].split("###")[0].splitlines()
    head = [c.strip() for c in next(x for x in lines if x.startswith("|")).split("|")]
    row = next(x for x in lines if f"| {provider} " in x)
    return dict(zip(head, (c.strip() for c in row.split("|")), strict=True))


def test_numbers_follow_from_the_records(run):
    text = tables.render(run)
    ours = cells(text, "ours cpu", "grpo_loss")
    assert ours["ms"] == "20"
    assert ours["GB/s"] == "100"  # 2 GB in 20 ms
    assert ours["of floor"] == "0.50"  # copy moves 6 GB in 30 ms: 2 GB take 10 ms
    assert ours["x eager"] == "**25.0**"
    assert ours["x compile"] == "**5.0**"
    eager = cells(text, "eager", "grpo_loss")
    assert (eager["x eager"], eager["x compile"]) == ("", "0.2")
    assert (eager["extra MB"], eager["% of logits"]) == ("64", "2000000.0")
    linear = cells(text, "ours cpu", "linear_grpo_loss")
    assert (linear["TFLOP/s"], linear["of floor"], linear["x eager"]) == ("3", "0.75", "**1.5**")


def test_failures_and_what_was_left_out_are_named(run):
    text = tables.render(run)
    trl = cells(text, "trl", "grpo_loss")
    assert trl["ms"] == ""
    assert trl["note"] == "failed: OutOfMemoryError: 5 / GB"
    assert "- 16384 x 262144 float32: needs at least 51.5 GB" in text


def test_a_wrong_result_is_no_competitor(run):
    run["records"][1]["status"] = "wrong"
    text = tables.render(run)
    assert cells(text, "ours cpu", "grpo_loss")["x eager"] == ""
    assert cells(text, "eager", "grpo_loss")["note"] == "wrong"


@pytest.mark.parametrize("field", ["load_at_start", "foreign_cores"])
def test_a_busy_machine_is_warned_about(run, field):
    assert "Warning" not in tables.render(run)
    run[field] = 0.7
    run["records"][0]["foreign_cores"] = 0.7
    text = tables.render(run)
    assert "**Warning: the machine was not quiet**" in text
    assert "ours cpu*" in text


def test_the_page_gets_its_section_and_figures(written, tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- bench:cpu -->\nlast month\n<!-- /bench:cpu -->\nafter\n")
    for _ in range(2):  # again, over its own output
        assert report.main([str(written), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:cpu -->\n![")
    assert text.endswith("<!-- /bench:cpu -->\nafter\n")
    assert "last month" not in text
    assert text.count("### grpo_loss") == 1
    for kind in ("speedup", "bandwidth", "memory"):
        assert f"](figures/cpu-{kind}.svg)" in text
        assert (page.parent / "figures" / f"cpu-{kind}.svg").read_text().rstrip().endswith("</svg>")


def test_figures_are_the_same_from_the_same_run(run, tmp_path):
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = figures.draw(run["records"], tmp_path / name, "cpu")
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ('{"benchmarks": []}', 'has no "regrpo" entry'),
        ("[]", 'has no "regrpo" entry'),
        ('{"regrpo": {"format": 0}}', "has format 0"),
        (f'{{"regrpo": {{"format": {tables.FORMAT}, "records": []}}}}', "holds no measurement"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert message in error


def test_a_page_without_the_section_is_refused(written, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    assert report.main([str(written), "--into", str(page)]) == 1
    assert "has no section between <!-- bench:cpu -->" in capsys.readouterr().err
    assert page.read_text() == "nothing here\n"


def test_as_a_command(written, tmp_path):
    command = [sys.executable, "-m", "bench.report", written, "--figures", tmp_path / "figures"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "### linear_grpo_loss" in done.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_grid_has_every_shape_once(device):
    rows = cases.row_cases(device, grid=True)
    assert len(set(map(str, rows))) == len(rows)
    assert {(c.vocab, c.tokens, c.share) for c in rows} == {
        (v, t, s) for v in cases.VOCABULARIES for t in cases.TOKENS for s in cases.shares(t)
    }
    assert {c.logits for c in rows} == {"flat", "peaked"}
    assert {c.view for c in rows} == {"packed", "shifted"}
    linear = cases.linear_cases(device, grid=True)
    assert len(set(map(str, linear))) == len(linear)
    headline = cases.row_cases("cpu", grid=False)
    assert {(c.tokens, c.vocab) for c in headline} == {(768, 151936), (4096, 32000), (1024, 102400)}

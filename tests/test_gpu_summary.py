"""The summary of `scripts/gpu_suite.sh`, from made-up logs, and what the script says without a
device.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench_report import record

from bench import gpu_summary, tables

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "scripts" / "gpu_suite.sh"
ROWS = {"shape": "16384 x 151936", "dtype": "bfloat16"}
LINEAR = {"shape": "16384 x 151936 x 4096", "dtype": "bfloat16"}


def records():
    """copy moves 6 GB in 3 ms; the row ops move 2 GB, so their floor is 1 ms."""
    copy = record("", "copy", "floor", 0.003, traffic=6_000_000_000, **ROWS)
    return [
        record("token_log_probs + entropy", "ours triton", "ours", 0.002, **ROWS),
        record("token_log_probs + entropy", "ours cuda", "ours", 0.00105, **ROWS),
        copy | {"op": "token_log_probs + entropy"},
        record("grpo_loss", "ours triton inplace", "ours", 0.00125, **ROWS),
        record("grpo_loss", "ours cuda inplace", "ours", 0.0015, **ROWS),
        record("grpo_loss", "ours triton", "ours", 0.004, **ROWS),
        record("grpo_loss", "liger inplace", "peer", 0.0025, **ROWS),
        record("grpo_loss", "trl", "peer", 0.001, **ROWS) | {"status": "wrong"},
        copy | {"op": "grpo_loss"},
        record("linear_grpo_loss", "ours cuda", "ours", 0.1, **LINEAR),
        record("linear_grpo_loss", "3 GEMMs", "floor", 0.08, **LINEAR),
        record("linear_grpo_loss", "eager", "eager", 0.3, **LINEAR),
    ]


@pytest.fixture
def folder(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "steps.tsv").write_text(
        "build\t0\t31\t90\ntests\t1\t60\t120\nbench-headline\t0\t80\t130\n"
        "sanitizer\t124\t80\t80\nncu\tabsent\t0\t0\n"
    )
    (logs / "build.log").write_text(
        "WARNING: Running pip as the 'root' user\n"
        "csrc/cuda/grpo_loss.cu(12): warning #177-D: variable declared but never used\nok\n"
    )
    (logs / "tests.xml").write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.a" name="good"/>'
        '<testcase classname="tests.a" name="bad"><failure message="x"/></testcase>'
        '<testcase classname="tests.a" name="other"><skipped message="y"/></testcase>'
        "</testsuite></testsuites>"
    )
    (logs / "sanitizer-memcheck-cuda.log").write_text(
        "========= COMPUTE-SANITIZER\ncuda: every kernel ran\n========= ERROR SUMMARY: 0 errors\n"
    )
    (logs / "sanitizer-racecheck-triton.log").write_text(
        "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    )
    (logs / "sanitizer-initcheck-cuda.log").write_text("========= COMPUTE-SANITIZER\n")
    run = {"machine": {"device": "cuda"}, "records": records(), "left_out": {"a case": "too big"}}
    (tmp_path / "bench-headline.json").write_text(json.dumps({"regrpo": run}))
    (tmp_path / "bench-more.json").write_text("")
    (tmp_path / "ncu.csv").write_text(
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum",'
        '"dram__throughput.avg.pct_of_peak_sustained_elapsed"\n'
        '"","","ns","byte","%"\n'
        '"0","grpo_loss_kernel","1,250,000","2,489,319,424","88.5"\n'
    )
    return tmp_path


@pytest.fixture
def summary(folder):
    return gpu_summary.summarise(folder, {"name": "a device"})


def test_steps_tests_and_tools(summary):
    results = {s["name"]: s["result"] for s in summary["steps"]}
    assert results["tests"] == "failed with exit status 1"
    assert results["sanitizer"] == "timed out"
    assert results["ncu"] == "absent"
    assert not summary["ok"]
    assert summary["build_seconds"] == 31
    assert len(summary["build_warnings"]) == 1
    assert "#177-D" in summary["build_warnings"][0]
    tests = {"passed": 1, "failed": 1, "skipped": 1, "failures": ["tests.a::bad"]}
    assert summary["tests"] == tests
    assert summary["sanitizer"] == {
        "memcheck-cuda": "0 errors",
        "racecheck-triton": "2 hazards displayed (2 errors, 0 warnings)",
        "initcheck-cuda": "no verdict: the run did not end",
    }
    assert summary["ncu"] == [
        {
            "kernel": "grpo_loss_kernel",
            "nanoseconds": 1_250_000.0,
            "dram_bytes_read": 2_489_319_424.0,
            "dram_throughput_percent": 88.5,
        }
    ]
    json.dumps(summary)


def test_targets(summary):
    found = [(t["value"], t["met"], t["detail"]) for t in summary["targets"]]
    assert found == [
        (0.952, True, ""),  # 1 ms over the 1.05 ms of cuda
        (0.8, False, ""),
        (2.0, True, "against liger inplace"),
        (0.8, False, ""),
        (None, None, "no peer measured"),  # eager is no peer
    ]
    assert summary["bench_left_out"] == {"a case": "too big"}


def test_default_implementation_is_the_faster_at_its_best(summary):
    found = {row["op"]: row for row in summary["default_implementation"]}
    assert found["token_log_probs + entropy"]["faster"] == "cuda"
    assert found["grpo_loss"]["faster"] == "triton"
    assert found["grpo_loss"]["by"] == 1.2
    assert found["grpo_loss"]["seconds"] == {"triton": 0.00125, "cuda": 0.0015}
    assert "linear_grpo_loss" not in found  # one implementation alone


def test_bandwidth_of_each_implementation(summary):
    row = next(r for r in summary["bandwidth"] if r["op"] == "grpo_loss")
    assert row["copy_bytes_per_second"] == pytest.approx(2e12)
    assert row["share_of_copy"] == {
        "ours triton inplace": 0.8,
        "ours cuda inplace": 0.667,
        "ours triton": 0.25,
    }


def test_nothing_measured_is_no_verdict(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "steps.tsv").write_text("build\t1\t3\t90\n")
    summary = gpu_summary.summarise(tmp_path, {})
    assert [t["met"] for t in summary["targets"]] == [None] * 5
    assert summary["tests"] is None
    assert not summary["ok"]
    gpu_summary.print_short(summary)


def test_target_shapes_are_measured_on_a_gpu():
    from bench import cases

    rows = [(c.shape, c.dtype, c.variant) for c in cases.row_cases("cuda", grid=False)]
    linear = [(c.shape, c.dtype, c.variant) for c in cases.linear_cases("cuda", grid=False)]
    assert gpu_summary.TARGET_ROWS in rows
    assert gpu_summary.TARGET_LINEAR in linear
    assert tables.case_key(records()[0])[1:] == gpu_summary.TARGET_ROWS


def suite(*arguments):
    command = ["bash", str(SUITE), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a device")
def test_suite_without_a_device_says_so(tmp_path):
    done = suite("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_suite_lists_its_steps_within_nine_minutes(tmp_path):
    (tmp_path / "peer-1.0-py3-none-any.whl").touch()
    done = suite("--dry-run", "--wheels", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [line[0] for line in lines]
    assert names == [
        "peers",
        "build",
        "tests",
        "bench-headline",
        "bench-more",
        "sanitizer",
        "ncu",
    ]
    assert sum(int(line[1]) for line in lines) <= 9 * 60
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wat"], "unknown option --wat"),
        (["--out"], "--out needs a value"),
        (["--wheels", str(ROOT)], "holds no *.whl"),
    ],
)
def test_suite_refuses_wrong_options(arguments, message):
    done = suite(*arguments)
    assert done.returncode == 2
    assert message in done.stderr

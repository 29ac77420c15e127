"""What `scripts/gpu_suite.sh` found, as one JSON: `python -m bench.gpu_summary DIR`.

Reads the steps, logs and benchmark JSONs in DIR and writes DIR/summary.json. The exit status is 1
if a step failed. A target that was not measured is neither met nor missed: its value is null.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench import tables

TARGET_ROWS = ("16384 x 151936", "bfloat16", "")
TARGET_LINEAR = ("16384 x 151936 x 4096", "bfloat16", "")
ENTROPY_OP = "token_log_probs + entropy"
NCU_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_throughput_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers_per_thread",
}


def steps(log_folder: Path) -> list[dict[str, Any]]:
    found = []
    for line in (log_folder / "steps.tsv").read_text().splitlines():
        name, code, seconds, limit = line.split("\t")
        result = {"0": "passed", "absent": "absent", "124": "timed out", "137": "timed out"}
        found.append(
            {
                "name": name,
                "result": result.get(code, f"failed with exit status {code}"),
                "seconds": int(seconds),
                "limit": int(limit),
            }
        )
    return found


def build_warnings(log_folder: Path) -> list[str] | None:
    """Compiler warnings; None without a log."""
    log = log_folder / "build.log"
    if not log.exists():
        return None
    lines = log.read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if re.search(r"\bwarning\b.*:", line)]


def tests(log_folder: Path) -> dict[str, Any] | None:
    """Counts from pytest's XML, and the names of what failed; None where there is none, as when
    the run was cut off.
    """
    path = log_folder / "tests.xml"
    if not path.exists():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }


def sanitizer(log_folder: Path) -> dict[str, str]:
    """The tools' own verdict for each tool and implementation, or that there is none."""
    found = {}
    for path in sorted(log_folder.glob("sanitizer-*-*.log")):
        lines = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", path.read_text(errors="replace"))
        name = path.stem.removeprefix("sanitizer-")
        found[name] = lines[-1].strip() if lines else "no verdict: the run did not end"
    return found


def ncu(path: Path) -> list[dict[str, Any]] | None:
    """One entry a profiled kernel; None where ncu wrote no table."""
    if not path.exists():
        return None
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    if len(lines) < 3:  # names, units, one kernel
        return None
    found = []
    for row in list(csv.DictReader(lines))[1:]:
        kernel: dict[str, Any] = {"kernel": row["Kernel Name"]}
        for metric, name in NCU_METRICS.items():
            if row.get(metric):
                kernel[name] = float(row[metric].replace(",", ""))
        found.append(kernel)
    return found


def load_benches(
    folder: Path,
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, Any] | None]:
    """Records, cases left out and the machine, of all of the folder's runs."""
    records: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    machine = None
    for path in sorted(folder.glob("bench-*.json")):
        if path.stat().st_size == 0:  # pytest-benchmark opens it first and writes it last
            continue
        run = json.loads(path.read_text())["regrpo"]
        records += run["records"]
        left_out |= run["left_out"]
        machine = run["machine"]
    return records, left_out, machine


def implementation(record: dict[str, Any]) -> str:
    """ "triton" of "ours triton inplace"."""
    return record["provider"].split()[1]


def best_ours(case: list[dict[str, Any]]) -> dict[str, Any] | None:
    ours = [r for r in case if r["kind"] == "ours" and r["status"] == "ok"]
    return min(ours, key=lambda r: r["seconds"], default=None)


def defaults(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per op and shape: seconds of each implementation at its best, and the faster one."""
    found = []
    for case in tables.cases(records):
        seconds: dict[str, float] = {}
        for r in case:
            if r["kind"] == "ours" and r["status"] == "ok":
                name = implementation(r)
                seconds[name] = min(r["seconds"], seconds.get(name, r["seconds"]))
        if len(seconds) > 1:
            op, shape, dtype, variant = tables.case_key(case[0])
            ordered = sorted(seconds, key=seconds.__getitem__)
            found.append(
                {
                    "op": op,
                    "shape": shape,
                    "dtype": dtype,
                    "variant": variant,
                    "seconds": seconds,
                    "faster": ordered[0],
                    "by": round(seconds[ordered[1]] / seconds[ordered[0]], 3),
                }
            )
    return found


def find(records: list[dict[str, Any]], op: str, key: tuple[str, ...]) -> list[dict[str, Any]]:
    return [r for r in records if tables.case_key(r) == (op, *key)]


def floor_share(case: list[dict[str, Any]]) -> float | None:
    ours = best_ours(case)
    floor = tables.floor_seconds(case, ours) if ours else None
    return floor / ours["seconds"] if ours and floor else None


def ratio_to(case: list[dict[str, Any]], beginning: str = "") -> tuple[float | None, str]:
    """Best time of the peers whose names begin so over ours, and which peer that is."""
    ours = best_ours(case)
    peers = [
        r
        for r in case
        if r["kind"] == "peer" and r["status"] == "ok" and r["provider"].startswith(beginning)
    ]
    best = min(peers, key=lambda r: r["seconds"], default=None)
    if ours is None or best is None:
        return None, f"no {beginning or 'peer'} measured"
    return best["seconds"] / ours["seconds"], f"against {best['provider']}"


def targets(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the kernels are meant to reach on an H200."""
    log_probs = find(records, ENTROPY_OP, TARGET_ROWS)
    loss = find(records, "grpo_loss", TARGET_ROWS)
    linear = find(records, "linear_grpo_loss", TARGET_LINEAR)
    to_liger, liger = ratio_to(loss, "liger")
    to_peer, peer = ratio_to(linear)
    rows = [
        ("log-prob + entropy: share of copy bandwidth", 0.90, floor_share(log_probs), ""),
        ("grpo_loss: share of one read and one write", 0.85, floor_share(loss), ""),
        ("grpo_loss: times as fast as Liger's kernel", 1.4, to_liger, liger),
        ("linear_grpo_loss: share of the three GEMMs", 0.85, floor_share(linear), ""),
        ("linear_grpo_loss: times as fast as the best peer", 1.25, to_peer, peer),
    ]
    return [
        {
            "target": name,
            "at_least": threshold,
            "value": None if value is None else round(value, 3),
            "met": None if value is None else value >= threshold,
            "detail": detail,
        }
        for name, threshold, value, detail in rows
    ]


def bandwidths(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per row case: what copy reaches, and the share of it that each of ours does."""
    found = []
    for case in tables.cases(records):
        copy = next((r for r in case if r["provider"] == "copy" and r["status"] == "ok"), None)
        if copy is None:
            continue
        op, shape, dtype, variant = tables.case_key(case[0])
        shares = {}
        for r in case:
            floor = tables.floor_seconds(case, r)
            if r["kind"] == "ours" and r["status"] == "ok" and floor:
                shares[r["provider"]] = round(floor / r["seconds"], 3)
        found.append(
            {
                "op": op,
                "shape": shape,
                "dtype": dtype,
                "variant": variant,
                "copy_bytes_per_second": copy["traffic"] / copy["seconds"],
                "share_of_copy": shares,
            }
        )
    return found


def summarise(folder: Path, device: dict[str, Any]) -> dict[str, Any]:
    logs = folder / "logs"
    done = steps(logs)
    records, left_out, machine = load_benches(folder)
    build = next((s for s in done if s["name"] == "build"), None)
    return {
        "device": device,
        "machine": machine,
        "steps": done,
        "ok": all(s["result"] in ("passed", "absent") for s in done),
        "build_seconds": build["seconds"] if build else None,
        "build_warnings": build_warnings(logs),
        "tests": tests(logs),
        "sanitizer": sanitizer(logs),
        "ncu": ncu(folder / "ncu.csv"),
        "benches": sorted(path.name for path in folder.glob("bench-*.json")),
        "bench_left_out": left_out,
        "bandwidth": bandwidths(records),
        "targets": targets(records),
        "default_implementation": defaults(records),
    }


def describe_device() -> dict[str, Any]:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = None
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def print_short(summary: dict[str, Any]) -> None:
    for step in summary["steps"]:
        print(f"{step['name']:16} {step['result']:28} {step['seconds']:4d} s")
    if summary["tests"]:
        print(", ".join(f"{v} {k}" for k, v in summary["tests"].items() if k != "failures"))
        for name in summary["tests"]["failures"][:20]:
            print(f"  failed: {name}")
    for name, verdict in summary["sanitizer"].items():
        print(f"sanitizer {name:18} {verdict}")
    for row in summary["bandwidth"]:
        shares = ", ".join(f"{k} {v}" for k, v in row["share_of_copy"].items())
        speed = row["copy_bytes_per_second"] / 1e12
        print(f"{row['op']} {row['shape']} {row['dtype']}: copy {speed:.2f} TB/s; {shares}")
    for row in summary["default_implementation"]:
        print(f"{row['op']} {row['shape']} {row['dtype']}: {row['faster']} by {row['by']}")
    verdicts = {True: "met", False: "MISSED", None: "not measured"}
    for row in summary["targets"]:
        value = "-" if row["value"] is None else row["value"]
        said = f"{verdicts[row['met']]} {row['detail']}".strip()
        print(f"{row['target']:52} {value} of {row['at_least']}: {said}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "logs" / "steps.tsv").exists():
        print("usage: python -m bench.gpu_summary DIR, the folder that scripts/gpu_suite.sh wrote")
        return 2
    folder = Path(arguments[0])
    summary = summarise(folder, describe_device())
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_short(summary)
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the benchmarks share: settings of a run, paired timing, tables and JSON files."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
console = Console()


def parse(description: str | None, arguments: Sequence[str] | None, *extra: tuple[str, dict[str, Any]]) -> Any:
    """Settings of a run: `--quick`, `--out`, `--threads` and what the script adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/ by default, none with --quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch on the CPU")
    for name, options in extra:
        parser.add_argument(name, **options)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    return chosen


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": _clock(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "lightning")},
    }


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest round, and the median ratio to the first function's.

    The ratio is taken within each round, so whatever slows the machine for a while slows both sides of it.
    """

    median: float
    fastest: float
    slowest: float
    ratio: float


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Times functions side by side: A B C, A B C, ...; ratios are to A; `calls` a round where one is too short."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, rounds):
        for name, function in functions.items():
            spent = _seconds(function, calls)
            if turn >= 0:
                seconds[name].append(spent)
    first = next(iter(seconds.values()))
    return {
        name: Timing(
            statistics.median(spent),
            min(spent),
            max(spent),
            statistics.median(mine / base for mine, base in zip(spent, first, strict=True)),
        )
        for name, spent in seconds.items()
    }


def _clock() -> str:
    """One thread on the CPU is timed by the CPU time it gets: what else runs on the machine does not count."""
    return "CPU time" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "wall"


def _seconds(function: Callable[[], Any], calls: int) -> float:
    now = time.process_time if _clock() == "CPU time" else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = now()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (now() - start) / calls


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Prints rows as a table; `columns` maps keys of a row to format specifications."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right" if columns[name] else "left")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else format(row[name], spec) for name, spec in columns.items()))
    console.print(table)


def conclude(script: str, chosen: Any, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Prints what was measured on, and writes the JSON file."""
    console.print(", ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
    if path := write(script, chosen, rows, **facts):
        console.print(f"written: {os.path.relpath(path)}")


def write(script: str, chosen: Any, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Path | None:
    """Writes the JSON file, one line a row; returns where, if anywhere."""
    path = chosen.out or (None if chosen.quick else RESULTS / f"{Path(script).stem}.json")
    if path is None:
        return None
    content = {"command": _command(script, chosen), "machine": machine(), **facts}
    fields = [f"  {json.dumps(name)}: {_lines(value)}" for name, value in (content | {"rows": rows}).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    return path


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"


def _command(script: str, chosen: Any) -> str:
    options = {name: value for name, value in vars(chosen).items() if name != "out" and value not in (None, False)}
    words = [f"--{name}" if value is True else f"--{name} {_word(value)}" for name, value in options.items()]
    return " ".join(["python", f"benchmarks/{Path(script).name}", *words])


def rounded(timing: Timing) -> dict[str, float]:
    """Timing as plain figures."""
    return {name: float(f"{value:.4g}") for name, value in asdict(timing).items()}


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes allocated at the peak of a call beyond those allocated before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

"""Check and measure this version on one GPU, in at most 8 minutes: a table here, and everything as JSON.

    python scripts/gpu_check.py [--json gpu_check.json] [--minutes 8]
    python scripts/gpu_check.py --smoke

Each part is a process of its own with a time of its own: one that fails, or takes too long, is told and does not stop
the others, and what it had measured is kept. A step is the forward and backward pass of a LoRA, rank 32, on all 16
linears of a block, weights and images random, without the optimizer. `--smoke` runs everything on the CPU in small
sizes: its figures mean nothing.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

REPO = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
LEAST_SECONDS = 15  # in which a part is worth starting
SMOKE_FACTOR = 3  # on more time for each part, on a CPU that may have other work
KEPT_CHARACTERS = 2_000  # of the output of a part that failed

# The shortest time of a LoRA step in ms, batch 1, everything elementwise fused: products, attention, and traffic that
# cannot be avoided. On paper: docs/performance.md.
FLOORS = {"H200": {512: 15.7, 768: 39.7, 1024: 81.9}, "4090": {512: 75.8, 768: 190.0, 1024: 387.0}}
STEP_TFLOP = {512: 8.25, 768: 20.8, 1024: 42.7}  # for other devices: products and attention at the rate of a product


@dataclass(frozen=True)
class Part:
    """A part of the check."""

    name: str
    seconds: int  # that it may take


# In the order of their worth: where time runs out, it is for the last.
PARTS = (
    Part("device", 40),
    Part("ours eager", 60),
    Part("diffusers eager", 60),
    Part("ours compiled", 110),
    Part("diffusers compiled", 110),
    Part("tests", 120),
    Part("full", 45),
    Part("ours selective", 45),
    Part("ours checkpointing", 45),
    Part("ours compiled int8", 110),
    Part("ours swap", 45),
    Part("curve", 60),
    Part("caching", 60),
    Part("ours int8", 45),
)


def run_part(name: str, smoke: bool) -> None:
    """Run one part in this process, and print its rows as JSON, one a line."""
    import torch
    from gpu_checks import models, parts

    device = torch.device("cpu" if smoke else "cuda")
    place = parts.Place(device, torch.bfloat16, models.SMOKE if smoke else models.FULL)
    functions: Mapping[str, Callable[[], Iterator[Row]]] = {
        "device": partial(parts.device_part, place),
        "full": partial(parts.full_part, place),
        "curve": partial(parts.curve_part, place),
        "caching": partial(parts.caching_part, place),
        **{
            f"{whose} {policy}": partial(parts.step_part, place, whose, policy)
            for whose in ("ours", "diffusers")
            for policy in ("eager", "compiled", "selective", "checkpointing", "swap", "int8", "compiled int8")
        },
    }
    for row in functions[name]():
        print(json.dumps(row), flush=True)


def gpu_tests() -> Sequence[str]:
    """Return the command that runs the tests marked `gpu`, looking into no other files."""
    files = [
        str(path) for path in (REPO / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    return [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", *sorted(files)]


def command_of(part: Part, smoke: bool) -> Sequence[str]:
    """Return the command of a part."""
    if part.name == "tests":
        return gpu_tests()
    return [sys.executable, str(Path(__file__).resolve()), "--part", part.name, *(["--smoke"] if smoke else [])]


def measured(part: Part, smoke: bool, seconds: float) -> Row:
    """Run a part in a process of its own; return its rows, the seconds that it took, and what went wrong, if anything.

    Args:
        part: of the check.
        smoke: on the CPU.
        seconds: after which it is ended.
    """
    found: Row = {"part": part.name, "rows": []}
    if seconds < LEAST_SECONDS:
        return found | {"seconds": 0.0, "problem": "left out: the time of the whole check has run out"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command_of(part, smoke), stdout=output, stderr=errors, env=environment, cwd=REPO, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile
            process.wait()
        found["seconds"] = round(time.monotonic() - start, 1)
        lines = text_of(output).splitlines()
        if part.name == "tests":
            found["rows"] = [{"case": "tests marked gpu", "result": test_summary(lines)}]
        else:
            found["rows"] = [json.loads(line) for line in lines if line.startswith("{")]
        if code is None:
            found["problem"] = f"ended after its {seconds:.0f} s; the rows until then are kept"
        elif code != 0:
            told = lines if part.name == "tests" else text_of(errors).splitlines()
            found["problem"] = f"failed (exit code {code}): {told[-1] if told else 'nothing was said'}"
            found["output"] = "\n".join(told)[-KEPT_CHARACTERS:]
    return found


def text_of(file: IO[str]) -> str:
    """Return all that was written into a file."""
    file.seek(0)
    return file.read()


def test_summary(lines: Sequence[str]) -> str:
    """Return pytest's last line with numbers of tests."""
    summaries = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return summaries[-1].strip("= ") if summaries else "no tests were run"


def driver() -> str:
    """Return the version of the GPU's driver, as far as it can be found."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip().partition("\n")[0] or "unknown"


def floor_ms(rows: Sequence[Row], side: int, batch: int) -> float | None:
    """Return the floor of a step on the device that the rows are of; None for a size that it is not known for."""
    facts: Row = {}
    for row in rows:
        facts |= row
    for name, known in FLOORS.items():
        if name in facts.get("device", "") and side in known:
            return known[side] * batch
    if side in STEP_TFLOP and "gemm_tflops" in facts:
        return STEP_TFLOP[side] / facts["gemm_tflops"] * 1e3 * batch
    return None


def add_ratios(parts: Sequence[Row]) -> None:
    """Put into each step's row its ratio to the floor, and to diffusers of the same kind (compiled or not)."""
    rows = {part["part"]: part["rows"] for part in parts}
    steps = {
        (row["case"], row["side"], row["batch"]): row
        for part in rows.values()
        for row in part
        if "ms" in row and "batch" in row
    }
    for (case, side, batch), row in steps.items():
        floor = floor_ms(rows.get("device", []), side, batch)
        if floor is not None:
            row["to_floor"] = row["ms"] / floor
        policy = "compiled" if case.endswith("compiled") else "eager"
        theirs = steps.get((f"diffusers {policy}", side, batch))
        if case.startswith("ours") and theirs is not None:
            row["to_diffusers"] = row["ms"] / theirs["ms"]


def table(parts: Sequence[Row]) -> Iterator[str]:
    """Yield the lines that a person reads."""
    for part in parts:
        yield f"\n== {part['part']} ({part['seconds']:.0f} s)"
        for row in part["rows"]:
            yield "  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items() if not isinstance(value, list))
        if "problem" in part:
            yield f"  {part['problem']}"


def shown(value: Any) -> str:
    """Return a value as the table has it."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) + ")"
    return str(value)


def check(smoke: bool, minutes: float, path: Path | None) -> None:
    """Run all parts, print the table, and write the JSON after each of them, so that none is lost."""
    deadline = time.monotonic() + minutes * 60
    parts: list[Row] = []
    for part in PARTS:
        seconds = part.seconds * SMOKE_FACTOR if smoke else part.seconds
        parts.append(measured(part, smoke, min(seconds, deadline - time.monotonic())))
        print("\n".join(table(parts[-1:])), flush=True)
        if path is not None:
            add_ratios(parts)
            path.write_text(json.dumps({"driver": driver(), "smoke": smoke, "parts": parts}, indent=1) + "\n")
    add_ratios(parts)
    print(
        f"\n{'part':<20} {'case':<22} {'side':>5} {'batch':>5} {'ms':>9} {'GiB':>6} {'/ floor':>8} {'/ diffusers':>11}"
    )
    for part in parts:
        for row in part["rows"]:
            if "ms" in row and "batch" in row:
                numbers = (row["peak_gib"], row.get("to_floor"), row.get("to_diffusers"))
                peak, floor, theirs = ("-" if number is None else f"{number:.2f}" for number in numbers)
                print(
                    f"{row['case']:<22} {row['side']:>5} {row['batch']:>5} {row['ms']:>9.1f} {peak:>6} {floor:>8} "
                    f"{theirs:>11}"
                )
    print("driver", driver())


def main() -> None:
    """Parse the command line, and check, or run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--smoke", action="store_true", help="on the CPU, in small sizes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        run_part(options.part, options.smoke)
        return
    check(options.smoke, options.minutes, options.json)


if __name__ == "__main__":
    main()

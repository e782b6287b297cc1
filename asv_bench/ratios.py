"""The table of speed: dcnlib against a plain convolution and against other deformable ones.

    python asv_bench/ratios.py                        the classes of layers, on this machine
    python asv_bench/ratios.py --part dtypes          or layout, isas, threads, overhead, memory,
                                                      stages, peers; "all" takes them all
    python asv_bench/ratios.py --only "depthwise"     the layers whose class or name matches
    python asv_bench/ratios.py --json FILE            adds what was measured to FILE
    python asv_bench/ratios.py --show FILE            prints FILE without measuring
    python asv_bench/ratios.py --show FILE --markdown README.md --figure docs/figures/speed.png
    python asv_bench/ratios.py --show FILE --stages docs/figures/stages.png

Every figure is a ratio within one process and is taken at one thread in processor time: the two
sides run in turns, each turn gives a ratio, the median counts. conv2d is called as users call it:
eager, contiguous, its weights not packed beforehand. Offsets are N(0, 2), with mask and bias.

The peers need packages that dcnlib does not: name a Python that has them in DCNLIB_PEERS_PYTHON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before any OpenMP runtime loads

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that was built in place

import dcnlib
import ratios_report
import ratios_stages
from benchmarks import memory, rivals
from dcnlib import _bench
from dcnlib._bench import PASSES, Layer, arrays, measure, one_thread, ratio
from dcnlib._info import cpu_model, version_of
from dcnlib._markdown import write_block
from dcnlib.testing import cpu_isas
from ratios_layers import CLASSES, ODD, PEER_LAYERS, PEERS, SAMPLE

Row = dict[str, Any]

#: A call is undisturbed if its threads waited for a core less than this share of its time.
_WAITED = 0.02


# --- measuring ------------------------------------------------------------------------------------


def door_calls(layer: Layer, door: str, against: list[str], **kinds: Any) -> list[dict[str, Any]]:
    """For each pass dcnlib and what it is compared with; "core" leaves torch's dispatcher out."""
    calls = _bench.torch_calls(layer, against, **kinds)
    if door == "core":
        for which, call in zip(calls, core_calls(layer, **kinds), strict=True):
            which["dcnlib"] = call
    return calls


def core_calls(layer: Layer, dtype: str = "float32", channels_last: bool = False) -> list[Any]:
    """The CPU backend on addresses, outputs allocated by torch: the kernels without any door."""
    import torch

    from dcnlib._problem import deform_conv2d_problem
    from dcnlib.backends import cpu

    number = getattr(torch, dtype)
    tensors = [torch.from_numpy(array).to(number) for array in arrays(layer)]
    shapes = [(tuple(tensor.shape), dtype) for tensor in tensors]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input, offset, weight, bias, mask, grad_output = tensors
    input, grad_output = (t.contiguous(memory_format=memory_format) for t in (input, grad_output))
    problem = deform_conv2d_problem(
        "ratios", *shapes[:5], None, (layer.stride,) * 2, (layer.padding,) * 4,
        (layer.dilation,) * 2, layer.groups, layer.offset_groups, channels_last,
    )  # fmt: skip

    def addresses(*operands):
        return [operand.data_ptr() for operand in operands]

    def forward():
        output = torch.empty_like(grad_output)
        cpu.forward(problem, *addresses(input, offset, weight, bias, mask, output), 1)
        return output

    def both():
        forward()
        grads = [torch.empty_like(tensor) for tensor in (input, offset, weight, bias, mask)]
        inputs = addresses(grad_output, input, offset, weight, mask)
        cpu.backward(problem, *inputs, addresses(*grads), 1)
        return grads

    return [forward, both]


def classes(options: argparse.Namespace) -> Iterator[Row]:
    for name, group in CLASSES.items():
        for layer in chosen(group.layers, options.only, name):
            for which, calls in zip(
                PASSES, door_calls(layer, options.door, ["conv2d"]), strict=True
            ):
                seconds = measure(calls, options.rounds)
                turns = [a / b for a, b in zip(seconds["dcnlib"], seconds["conv2d"], strict=True)]
                yield {
                    "class": name,
                    "layer": str(layer),
                    "pass": which,
                    "ms": 1e3 * statistics.median(seconds["dcnlib"]),
                    "conv2d_ms": 1e3 * statistics.median(seconds["conv2d"]),
                    "ratio": statistics.median(turns),
                    "turns": [min(turns), max(turns)],
                }
    for layer, full in ODD:
        if chosen((layer,), options.only, "odd channels"):
            yield from versus("odd channels", layer, {"as": str(full)}, options,
                              lambda full=full: door_calls(full, options.door, []))  # fmt: skip


def dtypes(options: argparse.Namespace) -> Iterator[Row]:
    for layer in chosen(SAMPLE, options.only):
        for dtype in ("float16", "bfloat16", "float64"):
            yield from versus(dtype, layer, {}, options,
                              lambda layer=layer: door_calls(layer, options.door, []),
                              dtype=dtype)  # fmt: skip


def layout(options: argparse.Namespace) -> Iterator[Row]:
    for layer in chosen(SAMPLE, options.only):
        yield from versus("channels_last", layer, {}, options,
                          lambda layer=layer: door_calls(layer, options.door, []),
                          channels_last=True)  # fmt: skip


def versus(
    name: str,
    layer: Layer,
    facts: Row,
    options: argparse.Namespace,
    other: Callable[[], list[dict[str, Any]]],
    **kinds: Any,
) -> Iterator[Row]:
    """dcnlib on `layer` with `kinds` against dcnlib on something else, and conv2d on the first."""
    mine = door_calls(layer, options.door, ["conv2d"], **kinds)
    for which, these, those in zip(PASSES, mine, other(), strict=True):
        seconds = measure(these | {"other": those["dcnlib"]}, options.rounds)
        yield {
            "class": name,
            "layer": str(layer),
            "pass": which,
            **facts,
            "ms": 1e3 * statistics.median(seconds["dcnlib"]),
            "ratio": ratio(seconds["dcnlib"], seconds["other"]),
            "to_conv2d": ratio(seconds["dcnlib"], seconds["conv2d"]),
        }


def isas(options: argparse.Namespace) -> Iterator[Row]:
    """Each instruction set against the best one, and AVX2 against AVX-512.

    `with` switches them around every call.
    """
    usable = cpu_isas()
    pairs = [(isa, usable[-1]) for isa in ("avx512", "avx2", "baseline", "scalar")]
    pairs.append(("avx2", "avx512"))
    for layer in chosen(SAMPLE, options.only):
        calls = door_calls(layer, options.door, [])
        for isa, other in dict.fromkeys(pairs):
            if isa == other or not {isa, other} <= set(usable):
                continue
            for which, call in zip(PASSES, calls, strict=True):
                seconds = measure(
                    {name: limited(call["dcnlib"], name) for name in (isa, other)},
                    2 if isa == "scalar" else options.rounds,
                )
                yield {
                    "class": f"{isa}/{other}",
                    "layer": str(layer),
                    "pass": which,
                    "ms": 1e3 * statistics.median(seconds[isa]),
                    "ratio": ratio(seconds[isa], seconds[other]),
                }


def limited(call: Callable[[], Any], isa: str) -> Callable[[], Any]:
    def run():
        with dcnlib.cpu_isa(isa):
            return call()

    return run


def threads(options: argparse.Namespace) -> Iterator[Row]:
    """One thread to two: wall time of the calls whose threads never waited for a core.

    Beside it the processor time of the busiest thread, which other programs disturb less; it means
    something where threads do not spin while they wait. Waking a thread that sleeps costs some 20
    microseconds a barrier: GOMP_SPINCOUNT=300000, what libgomp does by itself, is for a quiet machine.
    """
    import torch

    if len(os.sched_getaffinity(0)) < 2:
        print("threads: left out, there is one core")
        return
    for layer in chosen(SAMPLE, options.only):
        for which, calls in zip(PASSES, _bench.torch_calls(layer, ["conv2d"]), strict=True):
            undisturbed: dict[tuple[str, int], list[float]] = {
                (name, n): [] for name in calls for n in (1, 2)
            }
            busiest = {key: [] for key in undisturbed}
            end = time.perf_counter() + options.seconds
            while time.perf_counter() < end and (
                min(len(times) for times in undisturbed.values()) < 25
            ):
                for (name, n), times in undisturbed.items():
                    dcnlib.set_num_threads(n)
                    torch.set_num_threads(n)
                    calls[name]()
                    for _ in range(3):
                        clean, wall, busy = watched(calls[name])
                        busiest[name, n].append(busy)
                        if clean:
                            times.append(wall)
            row = {"class": "threads", "layer": str(layer), "pass": which}
            row["spin"] = os.environ["GOMP_SPINCOUNT"]
            row["undisturbed"] = min(len(times) for times in undisturbed.values())
            clock = undisturbed if row["undisturbed"] >= 5 else busiest
            row["clock"] = "wall" if clock is undisturbed else "busiest thread"
            for name in calls:
                one, two = (statistics.median(clock[name, n]) for n in (1, 2))
                row |= {f"{name}_ms": [1e3 * one, 1e3 * two], f"{name}_speedup": one / two}
                one, two = (statistics.median(busiest[name, n]) for n in (1, 2))
                row[f"{name}_busiest"] = one / two
            yield row
    dcnlib.set_num_threads(1)
    torch.set_num_threads(1)


def watched(call: Callable[[], Any]) -> tuple[bool, float, float]:
    """Whether no thread waited for a core, seconds on the wall, those of the busiest thread."""
    before = thread_seconds()
    mine, start = time.thread_time(), time.perf_counter()
    call()
    wall, mine = time.perf_counter() - start, time.thread_time() - mine
    after = thread_seconds()
    ran, waited = (
        {task: times[i] - before.get(task, (0.0, 0.0))[i] for task, times in after.items()}
        for i in (0, 1)
    )
    ran[str(threading.get_native_id())] = mine  # without what reading the others took
    return sum(waited.values()) < _WAITED * wall, wall, max(ran.values())


def thread_seconds() -> dict[str, tuple[float, float]]:
    """Of each thread of this process: seconds on a core, seconds ready but without one."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/self/task/{task}/schedstat").read_text()
            found[task] = tuple(1e-9 * int(number) for number in text.split()[:2])
    return found


def overhead(options: argparse.Namespace) -> Iterator[Row]:
    """Microseconds of a call with nothing to compute, by how much of dcnlib it goes through."""
    import torch

    layer = Layer(1, 1, 1, 1)
    core = core_calls(layer)
    torch_forward, torch_both = (call["dcnlib"] for call in _bench.torch_calls(layer, []))
    numpy_forward, _ = (call["dcnlib"] for call in _bench._numpy_calls(layer, *arrays(layer)))
    conv2d, conv2d_both = (call["conv2d"] for call in _bench.torch_calls(layer, ["conv2d"]))
    leaves = [torch.from_numpy(array).requires_grad_() for array in arrays(layer)[:5]]
    input, offset, weight, bias, mask = leaves
    calls = {
        "kernel": core[0],
        "numpy": numpy_forward,
        "inference": torch_forward,
        "gradients": lambda: dcnlib.deform_conv2d(input, offset, weight, bias, mask=mask),
        "kernel, forward + backward": core[1],
        "forward + backward": torch_both,
        "conv2d": conv2d,
        "conv2d, forward + backward": conv2d_both,
    }
    best = dict.fromkeys(calls, math.inf)
    for _ in range(3 * options.rounds):
        for name, call in calls.items():
            seconds = timeit.Timer(call, timer=time.process_time).timeit(200) / 200
            best[name] = min(best[name], seconds)
    for name, seconds in best.items():
        yield {"class": "overhead", "layer": name, "us": 1e6 * seconds}


def memories(options: argparse.Namespace) -> Iterator[Row]:
    """What a call adds above its results, in a process of its own without torch."""
    if memory.why_not():
        print(memory.why_not())
        return
    for layer in chosen((*SAMPLE, SAMPLE[2]._replace(batch=4)), options.only):
        for which in ("forward", "backward"):
            done = _again(sys.executable, ["--memory-of", json.dumps([layer, which])])
            input, _, weight, _, _, output = arrays(layer)
            results = (
                output.nbytes if which == "forward" else sum(a.nbytes for a in arrays(layer)[:5])
            )
            pixels = math.prod(layer.out_size)
            taps = layer.offset_groups * layer.kernel**2
            limit = input.nbytes + 2**20  # the input in another layout, and a thread's tiles
            if which == "backward":  # of one image: input, its gradient, grad_output, weights
                images = (2 * input.nbytes + output.nbytes) // layer.batch
                limit = images + 2 * weight.nbytes + 3 * 4 * taps * pixels + 2**20
            yield {
                "class": "memory",
                "layer": str(layer),
                "pass": which,
                "bytes": json.loads(done)["bytes"] - results,
                "limit": limit,
                "packed_weight": weight.nbytes,
            }


def memory_of(text: str) -> None:
    """The child of `memories`."""
    memory.settle()
    (layer, which) = json.loads(text)
    layer = Layer(*(tuple(v) if isinstance(v, list) else v for v in layer))
    dcnlib.set_num_threads(1)
    calls = {}
    for one in (Layer(4, 4, 6, 3), layer):
        input, offset, weight, bias, mask, grad_output = arrays(one)
        rest = (input, offset, weight, bias, one.stride, one.padding, one.dilation, mask)
        calls = {
            "forward": lambda rest=rest: dcnlib.deform_conv2d(*rest),
            "backward": lambda g=grad_output, rest=rest: dcnlib.deform_conv2d_backward(g, *rest),
        }
        if one is not layer:
            calls[which]()
    print(json.dumps({"bytes": memory.extra_bytes(calls[which])}))


def peers(options: argparse.Namespace) -> Iterator[Row]:
    """In the Python that has the peers, or here if that is the one."""
    python = os.environ.get("DCNLIB_PEERS_PYTHON", "")
    missing = [reason for name in PEERS if (reason := rivals.why_not(name))]
    if missing and python and not options.child:
        arguments = ["--part", "peers", "--child", "--rounds", str(options.rounds)]
        arguments += ["--door", options.door, "--only", options.only]
        for line in _again(python, arguments).splitlines():
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line)
        return
    for reason in missing:
        print(f"peers: left out: {reason}")
    if missing and not python:
        print("peers: DCNLIB_PEERS_PYTHON may name a Python that has them")
    usable = [name for name in PEERS if not rivals.why_not(name)]
    for layer in chosen(PEER_LAYERS, options.only):
        against = ["conv2d", *(["torchvision"] if "torchvision" in usable else [])]
        forward, both = door_calls(layer, options.door, against)
        place = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        place |= {"groups": layer.groups, "offset_groups": layer.offset_groups}
        for name in usable:
            if name != "torchvision":
                forward[name] = rivals.forward(name, *arrays(layer)[:5], **place)
        agree(layer, forward)
        for which, calls in zip(PASSES, (forward, both), strict=True):
            seconds = measure(calls, options.rounds)
            yield {
                "class": "peers",
                "layer": str(layer),
                "pass": which,
                "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
                "ratio": {name: ratio(seconds[name], seconds["conv2d"]) for name in seconds},
                "versions": {name: version_of(name) for name in ("torch", *usable)},
            }


def agree(layer: Layer, calls: dict[str, Callable[[], Any]]) -> None:
    """Every peer computes what dcnlib does, or the comparison means nothing."""
    import numpy as np

    mine = np.asarray(calls["dcnlib"]())
    for name, call in calls.items():
        if name != "conv2d":
            error = np.max(np.abs(np.asarray(call()) - mine)) / np.max(np.abs(mine))
            if not error < 1e-4:
                raise RuntimeError(
                    f"ratios: {name} computes something else on {layer}: {error:.1e}"
                )


def _again(python: str, arguments: list[str]) -> str:
    """This script in another process, with the same dcnlib."""
    folder = str(Path(dcnlib.__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": folder}
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), *arguments],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"ratios: {Path(python).name} {shlex.join(arguments)} failed")
    return done.stdout


def chosen(layers: tuple[Layer, ...], only: str, name: str = "") -> list[Layer]:
    return [layer for layer in layers if re.search(only, f"{name}: {layer}")]


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "classes": classes,
    "dtypes": dtypes,
    "layout": layout,
    "isas": isas,
    "threads": threads,
    "overhead": overhead,
    "memory": memories,
    "stages": ratios_stages.stages,
    "peers": peers,
}


# --- results -------------------------------------------------------------------------------------


def header(options: argparse.Namespace) -> Row:
    """Who measured a part: what a reader needs to believe it or to repeat it."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": str(dcnlib.cpu_isa()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dcnlib": dcnlib.__version__,
        "versions": {name: version_of(name) for name in ("numpy", "torch")},
        "commit": commit(),
        "door": options.door,
        "rounds": options.rounds,
    }


def commit() -> str | None:
    """The commit of the checkout, with a + if files of the library differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        sha = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--", "../csrc", "../dcnlib", "../setup.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + ("+" if changed else "")


def merge(path: Path, part: str, head: Row, rows: list[Row]) -> None:
    """Put a part into a file: rows of the same layer and pass are replaced."""
    report = json.loads(path.read_text()) if path.exists() else {}
    old = report.get(part, {"rows": []})["rows"]
    fresh = {identity(row) for row in rows}
    kept = [row for row in old if identity(row) not in fresh]
    order = {identity(row): place for place, row in enumerate(old)}
    rows = sorted([*kept, *rows], key=lambda row: order.get(identity(row), len(order)))
    report[part] = rounded(head | {"rows": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(report), indent=1) + "\n")


def identity(row: Row) -> tuple[str, str, str]:
    return row["class"], row["layer"], row.get("pass", "")


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


# --- command line ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.memory_of:
        memory_of(options.memory_of)
        return 0
    if options.show:
        report = json.loads(Path(options.show).read_text())
    else:
        report = {}
        with one_thread():
            for part in PARTS if options.part == "all" else [options.part]:
                head, rows = header(options), []
                for row in PARTS[part](options):
                    rows.append(row)
                    if options.child:
                        print(json.dumps(row), flush=True)
                    elif sys.stderr.isatty():
                        print(
                            f"\r\033[K{part}: {row['layer']}", end="", file=sys.stderr, flush=True
                        )
                if not rows and options.only:
                    print(f"{part}: no layer matches --only {options.only!r}", file=sys.stderr)
                if rows:
                    report[part] = rounded(head | {"rows": rows})
                    if options.json:
                        merge(Path(options.json), part, head, rows)
    if options.child:
        return 0
    if options.markdown:
        write_block(options.markdown, _bench.BLOCK, ratios_report.markdown(report))
    if options.figure:
        ratios_report.figure(report, Path(options.figure))
    if options.stages:
        ratios_report.stages_figure(report, Path(options.stages))
    if not (options.markdown or options.figure or options.stages):
        print(ratios_report.text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*PARTS, "all"], default="classes")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="a layer's time for threads")
    parser.add_argument(
        "--door", choices=["torch", "core"], default="torch", help="core: the CPU backend alone"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--show", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE", help="write the table between its markers")
    parser.add_argument("--figure", metavar="FILE", help="speed beside the others")
    parser.add_argument("--stages", metavar="FILE", help="where the time goes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

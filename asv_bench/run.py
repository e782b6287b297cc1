"""Runs the asv suite by profile, under a machine name that tells what was measured.

    python asv_bench/run.py quick              less than a minute for the last commit, and its build
    python asv_bench/run.py full               everything that runs without torch
    python asv_bench/run.py torch              the torch door and the rivals
    python asv_bench/run.py cuda               what runs on a CUDA device
    python asv_bench/run.py smoke --dry-run    every benchmark once, to see that it runs
    python asv_bench/run.py history -n 12      quick, on the last 12 commits that changed the code

What follows the profile goes to ``asv run``: commits, ``--dry-run``, ``-E existing:python3``.
asv has to be installed (``pip install asv``); the command that runs is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.resolve()
#: What changes the speed of a commit.
CODE = ("csrc", "dcnlib", "setup.py", "pyproject.toml")

#: Regular expressions for asv's -b: they match names with parameters, and what they leave out costs
#: no process.
_CPU = r"^(?!.*'cuda')"
PROFILES = {
    "quick": [
        r"^grid\.Time\..*'cpu'",
        r"^grid\.Memory\..*'cpu', \d, 1, 1,",
        r"^layers\.Error\..*'cpu',.*'float(32|16)'",
        r"^overhead\..*'(core|backend|numpy)'",
        r"^family\.Time.*'float32'",
        r"^start\.(Import|Size)\.",
    ],
    # Every benchmark once, on few parameters: do they all run?
    "smoke": [
        r"^grid\.(?!PeakB).*\('(cpu|cuda)', 1, 2, 1, 'forward'",
        r"^grid\.PeakBaseline\.",
        r"^layers\..*\('cpu', '(512@7x7|64@14x14 depthwise)', 'float32'",
        r"^(threads|isas|torch_door|rival)\..*'512@7x7'",
        r"^family\.(?!TimeP).*'(float32|zeros)'.*'forward'",
        r"^family\.TimePooling.*7x7', 'float32'",
        r"^(overhead|start)\.",
    ],
    "full": [_CPU + r"(grid|layers|family|threads|isas|overhead|start)\."],
    "torch": [r"^torch_door\.Cpu\.", r"^rival\.", r"^overhead\.", r"^start\.ImportWithTorch\."],
    "cuda": [r"'cuda'", r"^torch_door\.Cuda\."],
}
_TORCH = ("torch", "cuda")


def main(arguments: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(arguments)
    profile = "quick" if options.profile == "history" else options.profile
    machine = options.machine or machine_name()
    command = ["run", "--machine", machine]
    command += ["--config", "asv.torch.conf.json" if profile in _TORCH else "asv.conf.json"]
    for pattern in options.bench or PROFILES[profile]:
        command += ["-b", pattern]
    environment = os.environ | {"DCNLIB_BENCH_PROFILE": "quick" if profile == "quick" else "full"}
    with tempfile.TemporaryDirectory() as folder:
        if options.profile == "history":
            hashes = Path(folder) / "hashes"
            hashes.write_text("\n".join(code_commits(options.n)) + "\n")
            command += [f"HASHFILE:{hashes}", "--skip-existing"]
        elif not any(
            word.startswith(("-E", "HASHFILE:")) or "!" in word or ".." in word for word in rest
        ):
            command.append("HEAD^!")
        command += rest
        describe_machine(machine)
        print("asv", shlex.join(command), flush=True)
        asv = [sys.executable, "-m", "asv", *command]
        status = subprocess.run(asv, cwd=HERE, env=environment, check=False).returncode
    forget_paths(HERE / "results" / machine)
    return status


def machine_name() -> str:
    """Processor and cores, for example "intel-xeon-processor-2": a host name would tell nothing."""
    words = re.sub(r"\(.*?\)|@.*|\bCPU\b", " ", cpu_model().lower(), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"
    return f"{slug}-{os.cpu_count()}"


def describe_machine(name: str) -> None:
    """Tell asv about this machine; its own command drops what equals its guess."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = Path("~/.asv-machine.json").expanduser()
    machines = json.loads(known.read_text()) if known.exists() else {"version": 1}
    machines[name] = {
        "machine": name,
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "arch": platform.machine(),
        "cpu": cpu_model(),
        "num_cpu": str(os.cpu_count()),
        "ram": f"{memory:.0f} GiB",
    }
    known.write_text(json.dumps(machines, indent=1) + "\n")


def forget_paths(results: Path) -> None:
    """In results of an existing environment: Python's version where asv put the path of Python."""
    for path in results.glob("*-existing-py*.json"):
        content = json.loads(path.read_text())
        python = content["python"]
        if "/" not in python:
            continue
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        version, name = done.stdout.strip(), content["env_name"]
        content["env_name"] = f"existing-py{version}"
        content["python"] = content["params"]["python"] = version
        path.with_name(path.name.replace(name, content["env_name"])).write_text(json.dumps(content))
        path.unlink()


def cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def code_commits(count: int) -> list[str]:
    """The last commits of the branch that touched `CODE`, newest first."""
    command = ["git", "log", f"-{count}", "--first-parent", "--format=%H", "HEAD", "--", *CODE]
    done = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, text=True)
    return done.stdout.split()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", choices=[*PROFILES, "history"])
    parser.add_argument("--machine", help="another name than the processor's")
    parser.add_argument("-n", type=int, default=10, help="commits of a history (default 10)")
    parser.add_argument("-b", dest="bench", action="append", help="instead of the profile's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())

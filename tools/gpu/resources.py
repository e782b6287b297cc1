"""What the compiler made of the CUDA kernels: registers, spills, shared memory, wide memory accesses.

    python tools/gpu/resources.py            the table, and what differs from csrc/cuda/RESOURCES.txt
    python tools/gpu/resources.py --write    puts the table there

For one architecture, sm_90. Needs nvcc; the machine code's columns also need cuobjdump (of the
toolkit, or pip's nvidia-cuda-cuobjdump) and are "-" without it. No GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "csrc/cuda/RESOURCES.txt"
ARCH = "sm_90"
#: Columns of the machine code: instructions that begin with these.
CODE = {
    "load16": ("LDG.E.128",),
    "store16": ("STG.E.128",),
    "reduce16": ("REDG.E.ADD.F32x4",),
    "reduce": ("REDG.E.ADD.F32.", "REDG.E.ADD.F64", "RED.E.ADD"),
    "local": ("LDL", "STL"),
}
COLUMNS = ("registers", "spilled", "shared", *CODE)


class Toolkit(NamedTuple):
    """The programs of a CUDA toolkit; cuobjdump may be missing."""

    nvcc: Path
    version: str
    cuobjdump: Path | None


def toolkit() -> Toolkit | None:
    """Where setup.py would find nvcc, roughly; None where there is none."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.environ.get("CUDACXX"), *(f"{root}/bin/nvcc" for root in roots if root)]
    paths.append(shutil.which("nvcc"))
    packages = [path for f in sys.path for path in Path(f or ".").glob("nvidia/cu1*/bin")]
    paths += [str(folder / "nvcc") for folder in packages]
    nvcc = next((Path(path) for path in paths if path and Path(path).exists()), None)
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    folders = [nvcc.parent, *packages, *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    found = (folder / "cuobjdump" for folder in folders)
    cuobjdump = next((path for path in found if os.access(path, os.X_OK)), None)
    return Toolkit(nvcc, re.search(r"V([\d.]+)", said)[1], cuobjdump)


def measure(tools: Toolkit) -> dict[str, dict[str, str]]:
    """The columns of every kernel, by its name."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        tables = pool.map(lambda source: _measure(tools, source, Path(folder)), sources)
        return {kernel: row for table in tables for kernel, row in table.items()}


def _measure(tools: Toolkit, source: Path, folder: Path) -> dict[str, dict[str, str]]:
    cubin = folder / f"{source.stem}.cubin"
    command = [tools.nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={ARCH}"]
    command += ['-DDCN_CUDA_ARCHS="90"', source, "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    rows = {}
    for name, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling|\Z)", said, re.S):
        stores = int(re.search(r"(\d+) bytes spill stores", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        rows[name] = {
            "registers": re.search(r"Used (\d+) registers", text)[1],
            "spilled": str(stores),
            "shared": shared[1] if shared else "0",
        } | dict.fromkeys(CODE, "-")
    if tools.cuobjdump:
        _count_instructions(tools, cubin, rows)
    return {_short(name): row for name, row in rows.items()}


def _count_instructions(tools: Toolkit, cubin: Path, rows: dict[str, dict[str, str]]) -> None:
    path = os.pathsep.join([str(tools.cuobjdump.parent), os.environ.get("PATH", "")])
    code = subprocess.run(
        [tools.cuobjdump, "-sass", cubin],
        capture_output=True, text=True, check=True, env=os.environ | {"PATH": path},
    ).stdout  # fmt: skip
    for part in code.split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        found: Counter[str] = Counter()
        for instruction in re.findall(
            r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", part, re.M
        ):
            for column, prefixes in CODE.items():
                found[column] += instruction.startswith(prefixes)
        rows[name] |= {column: str(found[column]) for column in CODE}


def _short(mangled: str) -> str:
    """rows_sample<__half> of a mangled name."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|dcn::|^void ", "", name.strip())
    return re.sub(r"\(.*", "", name).replace(", ", ",")


def text(tools: Toolkit, table: dict[str, dict[str, str]]) -> str:
    """The table as the file has it."""
    lines = [f"# nvcc {tools.version}, {ARCH}; by tools/gpu/resources.py --write"]
    lines.append(f"{'kernel':<36}" + "".join(f"{column:>10}" for column in COLUMNS))
    for kernel in sorted(table):
        lines.append(f"{kernel:<36}" + "".join(f"{table[kernel][c]:>10}" for c in COLUMNS))
    return "\n".join(lines) + "\n"


def committed() -> tuple[str, dict[str, dict[str, str]]]:
    """nvcc's version and the columns in the file."""
    first, _, *lines = TABLE.read_text().splitlines()
    rows = (line.split() for line in lines)
    return re.search(r"nvcc ([\d.]+)", first)[1], {
        kernel: dict(zip(COLUMNS, values, strict=True)) for kernel, *values in rows
    }


def differences(found: dict[str, dict[str, str]], expected: dict[str, dict[str, str]]) -> list[str]:
    """What is not as expected; a "-" stands for anything."""
    lines = [f"{kernel}: not in the table" for kernel in sorted(found.keys() - expected.keys())]
    lines += [f"{kernel}: is gone" for kernel in sorted(expected.keys() - found.keys())]
    for kernel in sorted(found.keys() & expected.keys()):
        for column in COLUMNS:
            want, got = expected[kernel][column], found[kernel][column]
            if "-" not in (want, got) and want != got:
                lines.append(f"{kernel}: {column} {want} in the table, now {got}")
    return lines


def main(arguments: list[str]) -> int:
    tools = toolkit()
    if tools is None:
        print("resources: there is no nvcc; nothing was compiled and nothing checked")
        return 0
    table = measure(tools)
    print(text(tools, table), end="")
    if "--write" in arguments:
        TABLE.write_text(text(tools, table))
        return 0
    version, expected = committed()
    if version != tools.version:
        print(f"resources: the table is of nvcc {version}, this is {tools.version}: not compared")
        return 0
    lines = differences(table, expected)
    print("\n".join(lines) or "resources: as in csrc/cuda/RESOURCES.txt")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Which CUDA sources a GPU has run: csrc/cuda/VERIFIED.json, by the sha256 of every file.

    python tools/gpu/verified.py                   says whether they are the present ones
    python tools/gpu/verified.py --outstanding     notes the present sources as waiting for a run
    python tools/gpu/verified.py --record OUT      notes that check.sh has passed on them, with OUT's
                                                   summary; only check.sh calls it, on a GPU

A change since the last run on hardware fails nothing; it is said.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "csrc/cuda/VERIFIED.json"


def sources() -> dict[str, str]:
    """The sha256 of what the kernels are made of and of what launches them, by path."""
    paths = [ROOT / f"csrc/{name}.h" for name in ("bilinear", "dcn_params", "roi_axis")]
    for pattern in ("csrc/cuda/*.cu", "csrc/cuda/*.h", "dcnlib/backends/cuda/_[fp]*.py"):
        paths += ROOT.glob(pattern)
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


def state() -> str:
    """One sentence, or two."""
    record = json.loads(RECORD.read_text())
    if record["hardware_run"] == "outstanding":
        return "The hardware run is outstanding: no GPU has run the CUDA sources yet."
    ran, present = record["sources"], sources()
    changed = sorted(name for name in ran.keys() | present if ran.get(name) != present.get(name))
    if not changed:
        return f"{record['device']} ran these CUDA sources on {record['date']}."
    return (
        f"{record['device']} ran the CUDA sources on {record['date']}; these have changed since: "
        f"{', '.join(changed)}. The hardware run is outstanding."
    )


def write(hardware_run: str, device: str | None = None, stages: Sequence[str] = ()) -> None:
    """Note the present sources and what became of them."""
    record = {
        "hardware_run": hardware_run,
        "device": device,
        "date": datetime.now(UTC).date().isoformat() if device else None,
        "stages": list(stages),
        "sources": sources(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


def main(arguments: list[str]) -> int:
    if arguments == ["--outstanding"]:
        write("outstanding")
    elif arguments[:1] == ["--record"]:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        device = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        summary = Path(arguments[1]) / "summary.txt"
        write("passed", device.splitlines()[0].strip(), summary.read_text().splitlines())
    print(state())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

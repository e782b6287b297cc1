"""The demo's last step: the trained network where torch is not, as on a small device.

`run` saves the network and has a second Python process, in which torch cannot be imported, load it,
classify the test digits one at a time and report (`report`, which runs there).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import edge
from .digits import Digits

#: Runs first in the other process; argv: the model, the digits.
_CHILD = """
import sys, time
sys.modules["torch"] = None
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import dcnlib.edge
end = time.perf_counter()
from dcnlib.demo import device
device.report(*sys.argv[1:], middle - start, end - middle)
"""


def run(network: Any, digits: Digits, path: Path) -> dict[str, Any]:
    """Save `network` at `path` and use it without torch; what `report` found, beside torch's part."""
    import torch

    network.eval()
    edge.save(network, path)
    with torch.inference_mode():
        images = torch.from_numpy(digits.images)
        expected = torch.cat([network(some).argmax(1) for some in images.split(250)]).numpy()
        torch_ms = _milliseconds(network, images[:100].split(1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.npz"
        np.savez(file, images=digits.images, labels=digits.labels)
        package = str(Path(__file__).parents[2])
        where = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(path), str(file)],
            env=os.environ | {"PYTHONPATH": where}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"demo: the process without torch failed: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    same = int((np.array(found.pop("predictions")) == expected).sum())
    return found | {"same": same, "torch_ms": torch_ms, "file_bytes": path.stat().st_size}


def text(found: dict[str, Any], path: Path) -> str:
    """The lines for a terminal."""
    return (
        f"without torch, in a process with NumPy alone, from {path} "
        f"({found['file_bytes'] / 1e3:.0f} kB):\n"
        f"  accuracy {found['accuracy']:.1f} %, {found['same']} of {found['digits']} predictions "
        f"as with torch\n"
        f"  {found['ms']:.2f} ms per image, one at a time (torch {found['torch_ms']:.2f})\n"
        f"  peak memory {found['peak_bytes'] / 1e6:.0f} MB, before the first image "
        f"{found['loaded_bytes'] / 1e6:.0f} MB\n"
        f"  import {1e3 * found['import_s']:.0f} ms behind NumPy's "
        f"{1e3 * found['numpy_import_s']:.0f} ms"
    )


def report(model: str, digits: str, numpy_import_s: float, import_s: float) -> None:
    """Classify the digits without torch and print what came out, as JSON."""
    network = edge.load(model)
    data = np.load(digits)
    images, labels = data["images"], data["labels"]
    loaded = _memory("VmRSS")
    predictions = [int(network(images[i : i + 1]).argmax()) for i in range(len(images))]
    found = {
        "predictions": predictions,
        "digits": len(images),
        "accuracy": 100 * float((np.array(predictions) == labels).mean()),
        "ms": _milliseconds(network, [images[i : i + 1] for i in range(min(100, len(images)))]),
        "loaded_bytes": loaded,
        "peak_bytes": _memory("VmHWM"),
        "numpy_import_s": numpy_import_s,
        "import_s": import_s,
    }
    print(json.dumps(found))


def _milliseconds(network: Any, images: Any) -> float:
    """The median time of one image."""
    seconds = []
    for image in images:
        start = time.perf_counter()
        network(image)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _memory(name: str) -> int:
    """Resident bytes of this process: now (VmRSS) or at most (VmHWM)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
    except OSError:  # no Linux
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

"""What dcnlib costs on a device, beside onnxruntime and torch with torchvision: docs/edge.md's table.

    python tools/budget.py [PYTHON [NAME ...]]

Each figure comes from a process of its own. PYTHON, by default this one, is where the other packages
are looked for; dcnlib is measured in the running one. The layer is a modulated deformable convolution,
3 x 3, 16 to 16 channels, on one image of 640 x 480.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

_COMMON = """
import json, resource, sys, time
from pathlib import Path
def rss(name="VmRSS"):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
start = time.perf_counter()
import numpy as np
numpy_s, numpy_rss = time.perf_counter() - start, rss()
start = time.perf_counter()
{imports}
found = dict(import_s=time.perf_counter() - start, numpy_s=numpy_s, rss=rss(), numpy_rss=numpy_rss)
threads, dtype = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
C, H, W = 16, 480, 640
x = rng.standard_normal((1, C, H, W), np.float32)
offset = 2 * rng.standard_normal((1, 18, H, W), np.float32)
mask = rng.random((1, 9, H, W), np.float32)
weight = rng.standard_normal((C, C, 3, 3), np.float32)
bias = rng.standard_normal(C, np.float32)
{make}
before = rss()
start = time.perf_counter(); call(); found["first_ms"] = 1e3 * (time.perf_counter() - start)
found["layer"] = max(rss("VmHWM"), before) - before
clock = time.process_time if threads == 1 else time.perf_counter  # of one thread the same, undisturbed
times = []
for _ in range(9):
    start = clock(); call(); times.append(clock() - start)
found["ms"] = 1e3 * min(times)
found["calls"] = rss("VmHWM") - before
print(json.dumps(found))
"""

_CASES = {
    "dcnlib": (
        "import dcnlib",
        """
dcnlib.set_num_threads(threads)
if dtype != "float32":
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as kind
    else:
        kind = np.float16
    x, offset, mask, weight, bias = (a.astype(kind) for a in (x, offset, mask, weight, bias))
def call():
    return dcnlib.deform_conv2d(x, offset, weight, bias, 1, 1, 1, mask)
""",
    ),
    "onnxruntime": (
        "import onnxruntime",
        """
import onnx
from onnx import TensorProto as T, helper, numpy_helper
node = helper.make_node("DeformConv", ["x", "w", "o", "b", "m"], ["y"], kernel_shape=[3, 3],
                        pads=[1] * 4)
graph = helper.make_graph(
    [node], "g",
    [helper.make_tensor_value_info(n, T.FLOAT, a.shape) for n, a in
     (("x", x), ("o", offset), ("m", mask))],
    [helper.make_tensor_value_info("y", T.FLOAT, None)],
    [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
feed = {"x": x, "o": offset, "m": mask}
def call():
    return session.run(None, feed)[0]
""",
    ),
    "torch + torchvision": (
        "import torch, torchvision",
        """
torch.set_num_threads(threads)
x, offset, mask, weight, bias = map(torch.from_numpy, (x, offset, mask, weight, bias))
if dtype != "float32":
    x, offset, mask, weight, bias = (a.to(getattr(torch, dtype)) for a in (x, offset, mask, weight, bias))
def call():
    with torch.inference_mode():
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, 1, 1, 1, mask)
""",
    ),
}
_PACKAGES = {
    "dcnlib": ["dcnlib"],
    "onnxruntime": ["onnxruntime", "flatbuffers", "protobuf"],
    "torch + torchvision": ["torch", "torchvision"],
}
_SIZE = """
import sys
from importlib import metadata
total, versions = 0, []
for name in sys.argv[1:]:
    package = metadata.distribution(name)
    versions.append(package.version)
    for file in package.files or []:
        path = file.locate()
        total += path.stat().st_size if path.is_file() and path.suffix != ".pyc" else 0
print(total, versions[0])
"""


def child(python: str, code: str, *arguments: str) -> str | None:
    env = os.environ | {"GOMP_SPINCOUNT": "0"}
    env.pop("OMP_NUM_THREADS", None)
    command = [python, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def measure(name: str, python: str, threads: int, dtype: str) -> dict[str, float] | None:
    imports, make = _CASES[name]
    code = _COMMON.replace("{imports}", imports).replace("{make}", make)
    runs = [child(python, code, str(threads), dtype) for _ in range(2)]
    if None in runs:
        return None
    all_runs = [json.loads(run) for run in runs]  # type: ignore[arg-type]
    return {key: min(run[key] for run in all_runs) for key in all_runs[0]}


def main(other: str = sys.executable, *names: str) -> None:
    rows = {}
    for name in names or _CASES:
        python = sys.executable if name == "dcnlib" else other
        one, two = (measure(name, python, threads, "float32") for threads in (1, 2))
        if one is None or two is None:
            print(f"{name}: not importable in {python}")
            continue
        size, version = (child(python, _SIZE, *_PACKAGES[name]) or "0 ?").split()
        halves = [measure(name, python, 2, dtype) for dtype in ("float16", "bfloat16")]
        if name == "onnxruntime":
            halves = [None, None]  # its model is built for float32
        rows[f"{name} {version}"] = [
            f"{int(size) / 1e6:.1f} MB",
            f"{1e3 * one['import_s']:.0f} ms",
            f"{one['rss'] - one['numpy_rss']:.0f} MB",
            f"{one['layer']:.0f} MB",
            f"{one['calls']:.0f} MB",
            f"{one['first_ms']:.0f} ms",
            f"{one['ms']:.0f} ms",
            f"{two['ms']:.0f} ms",
            *("-" if half is None else f"{half['ms']:.0f} ms" for half in halves),
        ]
        print(name, one, two, halves, file=sys.stderr, flush=True)
    heads = [
        "installed", "import, over NumPy's", "memory after import, over NumPy's",
        "memory of the layer, result included", "of ten calls", "first call, 1 thread", "then", "2 threads",
        "float16, 2 threads", "bfloat16, 2 threads",
    ]  # fmt: skip
    print("| | " + " | ".join(rows) + " |")
    print("| --- " * (len(rows) + 1) + "|")
    for head, cells in zip(heads, zip(*rows.values(), strict=True), strict=True):
        print(f"| {head} | " + " | ".join(cells) + " |")
    for path in sorted(Path("dist").glob("*.whl")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    print("NumPy", metadata.version("numpy"), "Python", sys.version.split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])

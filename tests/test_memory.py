"""Memory: how much a call takes, what it does when there is none, and that it stays in its own.

`faults.py` has what runs in processes of its own.
"""

import math
import shutil
import subprocess
import sys

import pytest

import isolated
from dcnlib import testing
from dcnlib.testing import PROBLEMS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

MIB = 1 << 20
ISAS = testing.cpu_isas()


def sizes(batch, channels, side, outputs, kernel=3, **more):
    pad = kernel // 2
    return {
        "batch": batch,
        "in_channels": channels,
        "in_h": side,
        "in_w": side + 3,
        "out_channels": outputs,
        "kernel": [kernel, kernel],
        "padding": [pad] * 4,
        **more,
    }


SHAPES = {
    "typical": sizes(8, 64, 56, 64),
    "deep": sizes(8, 256, 28, 256),
    "deepest": sizes(8, 512, 14, 512),
    "large_image": sizes(1, 8, 512, 8),
    "few_channels": sizes(2, 3, 300, 32),
    "kernel_7": sizes(4, 32, 64, 32, 7),
    "depthwise": sizes(8, 128, 56, 128, groups=128),
    "groups": sizes(8, 96, 40, 96, groups=4, offset_groups=3),
}


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_workspace_is_bounded(name, num_threads):
    """Forward: one packed image and a megabyte a thread. Backward: some times an image's arrays."""
    shape = SHAPES[name]
    larger = shape | {"batch": 4 * shape["batch"]}
    cases = [("float32", case, num_threads) for case in (shape, larger)]
    one, four = (answer["result"] for answer in isolated.outcomes("faults", "peak", cases))
    channels, outputs, taps = shape["in_channels"], shape["out_channels"], shape["kernel"][0] ** 2
    # The image has a frame of zeros and its channels are rounded up to whole vectors; of smaller
    # images some megabytes are packed at once. Then the weights, and what a measurement is off by.
    pixels = (shape["in_h"] + 4) * (shape["in_w"] + 4)
    image = 4 * pixels * 16 * math.ceil(channels / 16)
    weight = 4 * 32 * math.ceil(outputs / 32) * channels * taps // shape.get("groups", 1)
    limit = max(4 * MIB, image) + weight + (num_threads + 1) * MIB
    assert one["forward"] <= limit and four["forward"] <= limit
    arrays = 4 * pixels * (channels + outputs + 3 * taps * shape.get("offset_groups", 1))
    limit = (64 + 4 * num_threads) * MIB + 3 * arrays
    assert one["backward"] <= limit and four["backward"] <= limit
    for direction in one:
        assert four[direction] <= one[direction] + 8 * MIB, direction


def test_no_column_buffer():
    """The measurement sees a buffer of columns where there is one: the reference's."""
    shape = sizes(1, 64, 56, 64)
    columns = 4 * 64 * 9 * 56 * 59
    (answer,) = isolated.outcomes("faults", "peak", [("float32", shape, 1)])
    assert answer["result"]["forward"] < columns / 2
    (answer,) = isolated.outcomes("faults", "peak_of_reference", [shape])
    assert answer["result"] > columns


def test_nothing_is_lost():
    """Ten thousand calls, half of them errors, leave the process as large as it was."""
    (answer,) = isolated.outcomes("faults", "growth", [10_000])
    assert answer["result"] < MIB


def test_workspace_is_kept():
    """One block for the next call, but none of more than 64 MB."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed leaves the process
    (answer,) = isolated.outcomes("faults", "kept", [None], **environment)
    without, with_block, bytes_kept = answer["result"]["usual"]
    assert with_block < without - 500 and 2 * MIB < bytes_kept < 64 * MIB
    *_, bytes_kept = answer["result"]["large"]
    assert bytes_kept < MIB


@pytest.mark.parametrize("num_threads", [1, 3])
def test_little_memory(num_threads):
    """MemoryError or the right result under any limit, and the right result afterwards."""
    # What is freed leaves the process: else its heap may hold most of what the next call needs.
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    (answer,) = isolated.outcomes("faults", "little_memory", [num_threads], **environment)
    counts = answer["result"]
    assert counts["MemoryError"] >= 5 and counts["right"] >= 5


@pytest.mark.parametrize("stack", ["", "32M"], ids=["usual_stacks", "large_stacks"])
def test_no_more_threads(stack):
    """Where threads cannot be created there are fewer, a warning, and the same result."""
    environment = {"OMP_STACKSIZE": stack} if stack else {}
    (answer,) = isolated.outcomes("faults", "few_threads", [8], **environment)
    counts = answer["result"]
    assert counts["right"] >= 20 and counts["warnings"] >= 5


ALLOCATOR = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
/* malloc and its kin that fail the nth time that at least 4 KiB are wanted. */
static _Atomic int left = 0, fired = 0;

int fail_nth(int n) {
  int before = fired;
  fired = 0;
  left = n;
  return before;
}

static int fails(size_t bytes) {
  if (bytes < 4096 || left == 0) return 0;
  if (--left > 0) return 0;
  fired = 1;
  errno = ENOMEM;
  return 1;
}

#define NEXT(name, type) static type next; if (!next) next = (type)dlsym(RTLD_NEXT, name)

void *malloc(size_t bytes) {
  typedef void *(*function)(size_t);
  NEXT("malloc", function);
  return fails(bytes) ? NULL : next(bytes);
}

void *realloc(void *old, size_t bytes) {
  typedef void *(*function)(void *, size_t);
  NEXT("realloc", function);
  return fails(bytes) ? NULL : next(old, bytes);
}

int posix_memalign(void **memory, size_t alignment, size_t bytes) {
  typedef int (*function)(void **, size_t, size_t);
  NEXT("posix_memalign", function);
  return fails(bytes) ? ENOMEM : next(memory, alignment, bytes);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_every_allocation_may_fail(num_threads, tmp_path):
    """MemoryError each time, and the right bytes the next time."""
    source, library = tmp_path / "allocator.c", tmp_path / "allocator.so"
    source.write_text(ALLOCATOR)
    command = ["cc", "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    case = (str(library), num_threads)
    environment = {"LD_PRELOAD": str(library)}
    (answer,) = isolated.outcomes("faults", "failing_allocation", [case], **environment)
    assert answer["result"]["MemoryError"] >= 20 and answer["result"]["right"] >= 20


def test_fresh_memory_does_not_matter():
    """The same bytes whatever malloc's memory, or the last call's, holds before it is written."""
    answers = [
        isolated.outcomes("faults", "fingerprints", [keep], MALLOC_PERTURB_=filling)[0]
        for filling, keep in (("0", 0), ("1", 0), ("127", 0), ("255", 0), ("255", 64 * MIB))
    ]
    assert len({answer["result"] for answer in answers}) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("flush", ["begin", "end"])
def test_guard_pages(flush, isa):
    """Not one byte before or behind any operand is read or written."""
    dtypes = ("float32", "float64", "float16")
    cases = [(name, dtype, isa, flush) for name in PROBLEMS for dtype in dtypes]
    answers = isolated.outcomes("faults", "guard_pages", cases)
    outcomes = dict(zip((case[:2] for case in cases), answers, strict=True))
    assert not {case: answer for case, answer in outcomes.items() if answer != {"result": "equal"}}


@pytest.mark.parametrize("flush", ["begin", "end"])
def test_guard_pages_guard(flush):
    (answer,) = isolated.outcomes("faults", "touch_a_guard", [flush])
    assert answer["died"] in ("SIGSEGV", "SIGBUS")

"""Hostile arguments through every door: no signal, no silent nonsense, one form of error.

`hostile.py` has the cases and what each must lead to, `doors.py` the doors. Each door's cases run
in a child process (`isolated.py`), so a crash is the failure of one case and says which.
"""

import re
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
import isolated
from doors import DOORS

FORM = re.compile(r"(\w+): (\w+): ([^;]+); expected ([^;]+), got (.+)", re.DOTALL)


@cache
def answers(kind):
    """What every case led to, by (door, name): one process for all doors of a kind, if it lives."""
    calls = [
        (door.name, name)
        for door in DOORS.values()
        if door.kind == kind
        for name in hostile.cases_of(door.name)
    ]
    return dict(zip(calls, isolated.outcomes("hostile", "attempt", calls, 300), strict=True))


def fault(door, case, answer):
    """What is wrong with the answer to a case; empty if nothing is."""
    if "died" in answer:
        return f"died: {answer['died']} {answer['stderr'][-300:]}"
    accepted, text = answer.get("result") == "equal", answer.get("text", "")
    if accepted and case.of_memory and door.takes_grad_output and case.names == ("bias",):
        return ""  # the backward direction has no use for the numbers in bias
    form = FORM.fullmatch(text)
    if door.raw and not hostile.has_torch_types(case.request()):
        # torch's parser refuses, or makes an int64 of it, which then has to be taken for that.
        refused = answer.get("error") in ("TypeError", "RuntimeError", "ValueError")
        if (refused and not form) or (case.error == "TypeError" and (accepted or form)):
            return ""
    if case.error is None:
        return "" if accepted else f"should be accepted: {answer}"
    if answer.get("error") != case.error:
        return f"should be a {case.error}: {answer}"
    if form is None:
        return f"text has another form: {text}"
    if form[1] != door.op or form[2] not in case.names:
        return f"should be {door.op}: one of {case.names}: {text}"
    return ""


@pytest.mark.parametrize("group", hostile.GROUPS, ids=lambda group: group.strip("-"))
@pytest.mark.parametrize("door", DOORS)
def test_every_case(door, group):
    names = hostile.cases_of(door, group)
    door = DOORS[door]
    faults = {
        name: fault(door, hostile.cases(door.kind)[name], answers(door.kind)[door.name, name])
        for name in names
    }
    wrong = [f"{name}: {text}" for name, text in faults.items() if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(names)} cases", *wrong[:20]])


@pytest.mark.parametrize("door", DOORS)
def test_every_case_has_a_group(door):
    names = hostile.cases_of(door)
    assert len(names) > 1000
    assert all(sum(name.startswith(group) for group in hostile.GROUPS) == 1 for name in names)


def test_isolated_survives_deaths():
    """The watcher itself: a result, an error, a signal, an exit and a hang, each reported."""
    cases = [
        "print('noise') or 1 + 1",
        "1 / 0",
        "__import__('os').write(2, b'last words') and __import__('os').abort()",
        "__import__('os')._exit(3)",
        "__import__('time').sleep(60)",
        "'after all that'",
    ]
    answers = isolated.outcomes("builtins", "eval", cases, timeout=6)
    assert answers[0] == {"result": 2} and answers[5] == {"result": "after all that"}
    assert answers[1]["error"] == "ZeroDivisionError" and "ArithmeticError" in answers[1]["bases"]
    assert answers[2]["died"] == "SIGABRT" and "last words" in answers[2]["stderr"]
    assert answers[3]["died"] == 3 and answers[4]["died"] == "timeout"


POOL = st.one_of(
    st.integers(-2, 6),
    st.sampled_from([2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 1, 2**63, 2**64 + 1]),
    st.integers(-(2**70), 2**70),
)
PAIR = st.one_of(POOL, st.tuples(POOL, POOL))


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    geometry=st.sampled_from(list(hostile.GEOMETRIES)),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "stride": PAIR,
            "padding": st.one_of(PAIR, st.tuples(POOL, POOL, POOL, POOL)),
            "dilation": PAIR,
            "groups": st.one_of(st.none(), POOL),
            "offset_groups": st.one_of(st.none(), POOL),
        },
    ),
    door=st.sampled_from([n for n, door in DOORS.items() if not door.raw and n != "module"]),
)
def test_hostile_integers(geometry, changes, door):
    """Any integers in several arguments at once: right, or an error of the one form."""
    in_range = all(
        (0 if argument == "padding" else 1) <= number <= hostile.LARGEST
        for argument, value in changes.items()
        for number in (value if isinstance(value, tuple) else (value,))
        if number is not None
    )
    request = hostile.request_with(geometry, **changes)
    error = None if in_range and hostile.fits(request()) else "ValueError"
    case = hostile.Case(request, error, (*changes, "input", "offset", "weight", "mask"))
    try:
        answer = {"result": hostile.outcome(DOORS[door], case)}
    except (ValueError, TypeError) as raised:
        answer = {"error": type(raised).__name__, "text": str(raised)}
    assert not fault(DOORS[door], case, answer)


def test_no_memory_for_a_huge_argument():
    """Stride-0 arrays of petabytes are legal; no copy of them fits. torch has its own error."""
    doors = [name for name, door in DOORS.items() if not door.shapes_only and name != "module"]
    results = isolated.outcomes("hostile", "run_out_of_memory", doors)
    for door, result in zip(doors, results, strict=True):
        if DOORS[door].kind == "torch":
            assert "allocate memory" in result["text"], (door, result)
        else:
            assert result.get("error") == "MemoryError", (door, result)


EMPTY_BATCH = """
import sys
import numpy as np
import dcnlib

h, w = map(int, sys.argv[1:])
input, offset = np.zeros((0, 1, h, w), np.float32), np.zeros((0, 2, h, w), np.float32)
weight, bias = np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32)
output = dcnlib.deform_conv2d(input, offset, weight, bias, backend="cpu")
assert output.shape == input.shape
grads = dcnlib.deform_conv2d_backward(output, input, offset, weight, bias, backend="cpu")
assert grads[0].shape == input.shape and grads[1].shape == offset.shape
assert grads[2].tolist() == [[[[0]]]] and grads[3].tolist() == [0]
regions = np.zeros((0, 5), np.float32), None, 7
output = dcnlib.deform_roi_pool(input, *regions, backend="cpu")
assert output.shape == (0, 1, 7, 7)
grads = dcnlib.deform_roi_pool_backward(output, input, *regions, backend="cpu")
assert grads[0].shape == input.shape
"""


@pytest.mark.parametrize("size", [(1 << 14, 1 << 14), ((1 << 28) - 2, (1 << 31) - 1)], ids=str)
def test_an_empty_batch_of_any_size(size):
    """There is no image whose size could ask for memory or work."""
    done = isolated.python(EMPTY_BATCH, *map(str, size), timeout=30)
    assert done.returncode == 0, done.stderr

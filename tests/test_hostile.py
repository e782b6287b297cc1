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
def answers(door, family):
    """What every case of a family led to, by name."""
    names = hostile.cases_of(family, door)
    results = isolated.outcomes("hostile", "attempt", [(door, name) for name in names])
    return dict(zip(names, results, strict=True))


def fault(door, name, answer):
    """What is wrong with the answer to a case; empty if nothing is."""
    case = hostile.CASES[name]
    if "died" in answer:
        return f"died: {answer['died']} {answer['stderr'][-300:]}"
    if case.error is None:
        return "" if answer.get("result") == "equal" else f"should be accepted: {answer}"
    if answer.get("error") != case.error:
        return f"should be a {case.error}: {answer}"
    form = FORM.fullmatch(answer["text"])
    if form is None:
        return f"text has another form: {answer['text']}"
    op, argument = form[1], form[2]
    if op != door.op or argument not in case.names:
        return f"should be {door.op}: one of {case.names}: {answer['text']}"
    return ""


GROUPS = {
    "integers": [
        f"{geometry}-{argument}"
        for geometry in hostile.GEOMETRIES
        for argument in ("stride", "padding", "dilation", "groups", "offset_groups")
    ],
    "shapes": list(hostile.TENSORS),
    "dtypes": ["all", "input", "float32", "float64", "float16"],
    "objects": list(hostile.TENSORS),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("family", "group"),
    [(family, group) for family, groups in GROUPS.items() for group in groups],
    ids=lambda value: value,
)
def test_every_case(family, group, door):
    results = answers(door, family)
    names = [name for name in results if name.startswith(f"{group}-")]
    assert names or (group == "grad_output" and not DOORS[door].takes_grad_output)
    faults = {name: fault(DOORS[door], name, results[name]) for name in names}
    wrong = [f"{name}: {text}" for name, text in faults.items() if text]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(names)} cases", *wrong[:20]])


def test_every_case_has_a_group():
    for family, groups in GROUPS.items():
        for name in hostile.FAMILIES[family]:
            assert sum(name.startswith(f"{group}-") for group in groups) == 1, name


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


@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck), database=None)
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
    door=st.sampled_from(list(DOORS)),
)
def test_hostile_integers(geometry, changes, door):
    """Any integers in several arguments at once: right, or an error of the one form."""
    name = "drawn"
    lowest = {"padding": 0}
    in_range = all(
        lowest.get(argument, 1) <= number <= hostile.LARGEST
        for argument, value in changes.items()
        for number in (value if isinstance(value, tuple) else (value,))
        if number is not None
    )
    request = hostile._with(geometry, **changes)
    error = None if in_range and hostile.fits(request()) else "ValueError"
    names = (*changes, "input", "offset", "weight", "mask")
    hostile.CASES[name] = hostile.Case(request, error, names)
    try:
        answer = {"result": hostile.attempt((door, name))}
    except (ValueError, TypeError) as raised:
        answer = {"error": type(raised).__name__, "text": str(raised)}
    assert not fault(DOORS[door], name, answer)


def test_no_memory_for_a_huge_argument():
    """Stride-0 arrays of petabytes are legal; no copy of them fits."""
    answers = isolated.outcomes("hostile", "run_out_of_memory", list(DOORS))
    assert [answer.get("error") for answer in answers] == ["MemoryError"] * len(DOORS), answers

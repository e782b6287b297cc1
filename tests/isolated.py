"""Runs cases in a child process, so that one that kills its process is a result like any other.

`outcomes` starts this file as a script, which imports a module of this folder and calls one of its
functions once per case. What a case returns (plain data) or raises comes back; a case that dies or
hangs is reported with its name, and the next process goes on behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: this one, with the package importable and few threads."""
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    settings = {"GOMP_SPINCOUNT": "0", "PYTHONFAULTHANDLER": "", "PYTHONPATH": path}
    return os.environ | settings | changes


def python(code: str, *arguments: str, timeout: float = 120, **changes: str):
    """Run `code` in a fresh interpreter; the completed process with its output as text."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(**changes),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def outcomes(
    module: str, function: str, cases: Sequence[Any], timeout: float = 120, **changes: str
) -> list[dict[str, Any]]:
    """``function(case)`` for every case, each as one of

    ``{"result": value}``, ``{"error": type, "bases": [types], "text": message}`` or
    ``{"died": signal or exit code, "stderr": last words}``.
    """
    results: list[dict[str, Any]] = []
    while len(results) < len(cases):
        results += _one_process(module, function, list(cases[len(results) :]), timeout, changes)
    return results


def _one_process(module, function, cases, timeout, changes) -> list[dict[str, Any]]:
    """The results up to and including the case that ended the process, if one did."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, __file__, module, function],
            env=environment(**changes),
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            output, _ = child.communicate(json.dumps(cases), timeout)
            end = child.returncode
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            end = "timeout"
        errors.seek(0)
        last_words = errors.read()[-2000:]
    results = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    if len(results) < len(cases):
        if isinstance(end, int) and end < 0:
            end = signal.Signals(-end).name
        results.append({"died": end, "stderr": last_words})
    return results


def _main(module: str, function: str) -> None:
    cases = json.load(sys.stdin)
    # Results have a channel of their own: what a case prints must not be taken for one.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call = getattr(importlib.import_module(module), function)
    for case in cases:
        try:
            result = {"result": call(case)}
        except Exception as error:  # every case has a result, whatever it raises
            bases = [base.__name__ for base in type(error).__mro__]
            result = {"error": type(error).__name__, "bases": bases, "text": str(error)}
        print(json.dumps(result), file=channel, flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

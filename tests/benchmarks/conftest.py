"""Timed only when asked for: among the other tests each of these runs once."""

import importlib.util

import pytest

_ASKED = ("benchmark_enable", "benchmark_only", "benchmark_save", "benchmark_autosave",
          "benchmark_compare", "benchmark_json")  # fmt: skip

if importlib.util.find_spec("pytest_benchmark"):

    @pytest.fixture
    def benchmark(benchmark, request):
        """pytest-benchmark's fixture, off unless one of its options is given."""
        if not any(request.config.getoption(name) for name in _ASKED):
            benchmark.disabled = True
        return benchmark

else:

    @pytest.fixture
    def benchmark():
        """Each test runs once, as it does with pytest-benchmark when nobody asks for times."""
        return lambda call, *arguments: call(*arguments)

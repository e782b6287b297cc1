"""How fast each instruction set is: one a processor lacks is skipped, not replaced."""

from __future__ import annotations

from contextlib import ExitStack

from .common import DIRECTIONS, LAYERS, Timed, numpy_call, skip


class Isas(Timed):
    params = [["amx", "avx512", "avx2", "baseline", "scalar"], list(LAYERS), DIRECTIONS]
    param_names = ["isa", "layer", "direction"]

    def setup(self, isa, layer, direction):
        import dcnlib

        self.limit = ExitStack()
        self.limit.enter_context(dcnlib.cpu_isa(isa))
        if (best := dcnlib.cpu_isa()) != isa:
            self.limit.close()
            skip(f"isa: this processor or build has no {isa}, only {best}")
        self.call = numpy_call(LAYERS[layer], direction)

    def teardown(self, *parameters):
        self.limit.close()

    def time_call(self, *parameters):
        self.call()

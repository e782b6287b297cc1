"""How fast each instruction set is: one a processor lacks is skipped, not replaced."""

from __future__ import annotations

from .common import DIRECTIONS, LAYERS, Timed, numpy_call, skip


class Isas(Timed):
    params = [["amx", "avx512", "avx2", "baseline", "scalar"], list(LAYERS), DIRECTIONS]
    param_names = ["isa", "layer", "direction"]

    def setup(self, isa, layer, direction):
        import dcnlib

        dcnlib.cpu_isa(isa).__enter__()  # until this process ends
        if dcnlib.cpu_isa() != isa:
            skip(f"isa: this processor or build has no {isa}, only {dcnlib.cpu_isa()}")
        self.call = numpy_call(LAYERS[layer], direction)

    def time_call(self, *parameters):
        self.call()

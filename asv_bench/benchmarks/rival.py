"""Other people's operators on the same arrays, forward, on one thread; skipped where not installed.

They do not change with dcnlib's commits: they are the yardstick in the same graph.
"""

from __future__ import annotations

from . import rivals
from .common import LAYERS, Timed, arrays, numpy_call, options, skip


class Forward(Timed):
    params = [["dcnlib", *rivals.NAMES], list(LAYERS)]
    param_names = ["who", "layer"]

    def setup(self, who, layer):
        case = LAYERS[layer]
        if who == "dcnlib":
            self.call = numpy_call(case, "forward")
            return
        reason = rivals.why_not(who)
        if reason:
            skip(reason)
        self.call = rivals.forward(who, *arrays(case)[:5], **options(case))
        self.call()

    def time_call(self, *parameters):
        self.call()

"""What more threads bring: time on the wall, the shortest of many calls.

Other programs on the cores make this noisy: it is recorded and drawn, and never judged.
"""

from __future__ import annotations

import os
import time

from .common import DIRECTIONS, LAYERS, least_seconds, numpy_call, skip


class Threads:
    params = [[1, 2, 4], list(LAYERS), DIRECTIONS]
    param_names = ["threads", "layer", "direction"]

    def setup(self, threads, layer, direction):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if threads > cores:
            skip(f"threads: {threads} wanted, {cores} cores")
        self.call = numpy_call(LAYERS[layer], direction, threads=threads)

    def track_wall_ms(self, *parameters):
        return 1e3 * least_seconds(self.call, time.perf_counter, 0.5)

    track_wall_ms.unit = "ms"

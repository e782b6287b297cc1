"""The scripts of asv_bench are no package: they import each other from their own folder."""

import sys
from pathlib import Path

ASV_BENCH = Path(__file__).resolve().parents[2] / "asv_bench"
if str(ASV_BENCH) not in sys.path:
    sys.path.append(str(ASV_BENCH))

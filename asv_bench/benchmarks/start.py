"""What dcnlib costs before its first call: import time, sizes of the wheel and the installation."""

from __future__ import annotations

import io
import zipfile
from importlib import metadata

from .common import need_torch, skip


class _Fresh:
    """A new process for each sample, with the files already in memory."""

    number = 1
    repeat = (3, 6, 4.0)
    rounds = 1
    warmup_time = 0


class Import(_Fresh):
    def timeraw_numpy(self):
        return "import numpy"

    def timeraw_dcnlib(self):
        return "import dcnlib"


class ImportWithTorch(_Fresh):
    def setup(self):
        need_torch()

    def timeraw_torch(self):
        return "import torch"

    def timeraw_dcnlib(self):
        return "import torch, dcnlib.torch_ops"


class Size:
    """The wheel is made again from the installed files, which compress to the same bytes."""

    def setup(self):
        try:
            files = metadata.distribution("dcnlib").files
        except metadata.PackageNotFoundError:
            files = None
        if not files:
            skip("size: dcnlib is not installed by pip")
        self.files = [
            file.locate() for file in files if ".." not in file.parts and file.suffix != ".pyc"
        ]

    def track_installed_bytes(self):
        return sum(file.stat().st_size for file in self.files)

    track_installed_bytes.unit = "bytes"

    def track_wheel_bytes(self):
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.files:
                archive.write(file)
        return len(wheel.getvalue())

    track_wheel_bytes.unit = "bytes"

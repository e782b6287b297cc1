"""The CUDA backend's place: it has no kernels in this version, and says so."""

from __future__ import annotations

name = "cuda"


def why_not(device: str) -> str | None:
    """The reason why this backend cannot run."""
    return (
        "this version of dcnlib has no CUDA kernels; "
        "move the tensors to the CPU with .cpu() and dcnlib runs there"
    )

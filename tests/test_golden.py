"""The numbers of other libraries: torchvision, Paddle and the ONNX node tests of DeformConv.

`data/make_golden.py` made the files and gives the arguments of the larger Paddle calls.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import dcnlib
from dcnlib.testing import UNIT_ROUNDOFF, errors

DATA = Path(__file__).parent / "data"
BACKENDS = ("reference", "cpu")
ARGUMENTS = ("input", "offset", "weight", "bias", "mask")


def load_script():
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_golden = load_script()


def stored(package, case):
    """The arrays of one case by name, None where it has no such argument."""
    with np.load(DATA / f"{package}.npz") as file:
        arrays = {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/")}
    assert arrays
    return dict.fromkeys(ARGUMENTS) | arrays


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", make_golden.SMALL)
@pytest.mark.parametrize("package", ["torchvision", "paddle"])
def test_output_and_gradients(package, case, backend):
    """Float64 output and five gradients within 1e-13, integer offsets included."""
    arrays = stored(package, case)
    stride, padding, dilation = arrays["sizes"][:6].reshape(3, 2).tolist()
    groups, offset_groups = arrays["sizes"][6:].tolist()
    input, offset, weight, bias, mask, grad_output = (
        None if arrays[name] is None else arrays[name].astype(np.float64)
        for name in (*ARGUMENTS, "grad_output")
    )
    inferred = (
        {} if package == "torchvision" else {"groups": groups, "offset_groups": offset_groups}
    )
    arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
    output = dcnlib.deform_conv2d(*arguments, **inferred, backend=backend)
    grads = dcnlib.deform_conv2d_backward(grad_output, *arguments, **inferred, backend=backend)
    np.testing.assert_allclose(output, arrays["output"], rtol=1e-13, atol=1e-13)
    compared = 0
    for name in ARGUMENTS:
        if f"grad_{name}" in arrays:
            expected = arrays[f"grad_{name}"]
            np.testing.assert_allclose(
                getattr(grads, name), expected, rtol=1e-13, atol=1e-13, err_msg=name
            )
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["exact", "real"])
def test_paddle_documentation_example(kind, version, backend):
    """3x3, (8, 1, 28, 28) to (8, 16, 26, 26): every value where all sums are exact, else a part."""
    golden = stored("paddle", f"example/{kind}/{version}")
    arrays = make_golden.paddle_example(unit={"exact": 0.125, "real": 0.001}[kind])
    if version == "v1":
        arrays["mask"] = None
    output = dcnlib.deform_conv2d(**arrays, backend=backend)
    assert output.shape == (8, 16, 26, 26) and output.dtype == np.float32
    part = output[make_golden.PART]
    if kind == "exact":
        np.testing.assert_array_equal(part, golden["part"])
        assert make_golden.checksum(output) == str(golden["sha256"])
    else:
        # Paddle adds offset and position in float32 and so is the less precise of the two.
        tolerance = 64 * UNIT_ROUNDOFF["float32"] * np.abs(golden["part"]).max()
        np.testing.assert_allclose(part, golden["part"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        "basic_deform_conv_with_padding",
        "basic_deform_conv_without_padding",
        "deform_conv_with_mask_bias",
        "deform_conv_with_multiple_offset_groups",
    ],
)
def test_onnx_node(case, backend):
    """The four node tests of ONNX: at most 4 u away from their decimal results."""
    arrays = stored("onnx", case)
    output = dcnlib.deform_conv2d(
        *(arrays[name] for name in ("input", "offset", "weight", "bias")),
        padding=tuple(arrays["padding"].tolist()),
        mask=arrays["mask"],
        offset_groups=int(arrays["offset_groups"]),
        backend=backend,
    )
    largest, _ = errors(output, arrays["output"].astype(np.float64), "float32")
    assert largest <= 4


def test_files_are_small():
    """What is stored is worth its place in the repository."""
    assert sum(file.stat().st_size for file in DATA.glob("*.npz")) <= 200_000

"""Tests of the torch door once more, with the emulated CUDA backend in the CPU's place.

Nothing that a program does with the operators depends on the device. What is not here either spies on
the CPU backend, has no launch, or is in `test_calls_cuda.py`.
"""

import pytest

pytest.importorskip("torch")

from dcnlib import _dispatch
from torch_ops.test_autograd import (  # noqa: F401  (collected here, with this file's fixtures)
    test_backward_operator_gradcheck,
    test_backward_twice,
    test_checkpoint,
    test_double_backward_in_16_bits,
    test_forward_mode_without_functorch,
    test_gradgradcheck,
    test_hooks,
    test_no_recording,
    test_nothing_to_record_is_a_usual_tensor,
    test_second_derivatives_agree,
    test_strides_of_grad_output,
    test_third_derivatives,
    test_vjp_outlives_its_transform,
)
from torch_ops.test_transforms import (  # noqa: F401
    fresh_compiler,
    test_autocast,
    test_autocast_leaves_float64,
    test_autocast_takes_any_mixture,
    test_backward_within_autocast,
    test_compile,
    test_compile_a_module,
    test_compile_other_transforms,
    test_dispatch_modes_see_the_operator,
    test_expanded_arguments,
    test_export_dynamic_batch,
    test_layouts_of_arguments,
    test_per_sample_gradients_of_a_module,
    test_tensor_subclasses,
    test_vmap,
    test_vmap_nested_and_mixed,
    test_vmap_of_gradients,
)


@pytest.fixture(autouse=True)
def in_the_place_of_the_cpu(emulation, monkeypatch):
    """CPU tensors go to the CUDA backend, and every test here makes it launch something."""
    monkeypatch.setitem(_dispatch._FOR_DEVICE, "cpu", "cuda")
    emulation.launches()
    yield
    assert not emulation.launches().startswith("now"), "nothing was launched"

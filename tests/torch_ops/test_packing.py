"""Frozen weights: packed once, the same bits, and never those of an older weight."""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
from dcnlib.backends import cpu  # noqa: E402
from dcnlib.nn import DeformConv2d, DeformConv2dPack, freeze  # noqa: E402
from dcnlib.torch_ops import packing  # noqa: E402


@pytest.fixture
def packs(monkeypatch):
    """Addresses of the weights that have been packed to stay."""
    done, pack_weight = [], cpu.pack_weight

    def counted(problem, weight):
        done.append(weight)
        return pack_weight(problem, weight)

    monkeypatch.setattr(cpu, "pack_weight", counted)
    return done


def layer_of(dtype=torch.float32, groups=1):
    layer = freeze(DeformConv2d(8, 36, 3, padding=1, groups=groups).to(dtype))
    layer.bias.requires_grad_(False)
    return layer


def operands(dtype=torch.float32, offset_groups=1):
    return (
        torch.randn(1, 8, 6, 7).to(dtype),
        torch.randn(1, 18 * offset_groups, 6, 7).to(dtype),
    )


def expected(layer, input, offset):
    """From a weight that nobody froze."""
    return dcnlib.deform_conv2d(input, offset, layer.weight.clone(), layer.bias, padding=1)


def check(layer, arguments):
    """Three calls: seen, packed, used."""
    for _ in range(3):
        assert torch.equal(layer(*arguments), expected(layer, *arguments))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_the_same_bits_from_one_packing(packs, dtype, groups):
    dtype = getattr(torch, dtype)
    layer = layer_of(dtype, groups) if groups < 8 else freeze(DeformConv2d(8, 16, 3, 1, 1, 1, 8))
    layer = layer.to(dtype).requires_grad_(False)
    check(layer, operands(dtype))
    assert packs == [layer.weight.data_ptr()]


def test_nothing_is_kept_unasked(packs):
    layer = DeformConv2d(8, 36, 3, padding=1).eval().requires_grad_(False)
    check(layer, operands())
    check(copy.deepcopy(layer_of()), operands())
    assert not packs


def rewritten_storage(weight):
    """Other memory, and after it memory that may lie where the first did."""
    for _ in range(2):
        weight.data = torch.randn(weight.shape)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "in place, inference": lambda layer: torch.inference_mode()(layer.weight.mul_)(2),
    "detached": lambda layer: layer.weight.detach()[0].zero_(),
    "load_state_dict": lambda layer: layer.load_state_dict(
        DeformConv2d(8, 36, 3, padding=1).state_dict()
    ),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(
        DeformConv2d(8, 36, 3, padding=1).state_dict(), assign=True
    ),
    "other memory": lambda layer: rewritten_storage(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "written around torch, then frozen again": lambda layer: (
        layer.weight.data.mul_(2),
        freeze(layer),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(packs, change):
    layer, arguments = layer_of(), operands()
    check(layer, arguments)
    before = layer(*arguments)
    CHANGES[change](layer)
    assert not torch.equal(layer(*arguments), before)
    layer.requires_grad_(False)
    check(layer, arguments)
    assert len(packs) == (1 if "assigned" in change else 2)


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}])
def test_training_is_never_behind(packs, kind):
    """torch's fused optimizers leave the version as it is."""
    layer, arguments = layer_of(), operands()
    check(layer, arguments)
    layer.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, **kind)
    for _ in range(3):
        optimizer.zero_grad()
        output = layer(*arguments)
        assert torch.equal(output, expected(layer, *arguments))
        output.sum().backward()
        optimizer.step()
        with torch.no_grad():
            check(layer, arguments)
    layer.requires_grad_(False)
    check(layer, arguments)
    assert len(packs) == 2


def test_other_uses_of_one_weight(packs):
    """Offset groups and instruction sets read it packed in other ways."""
    layer = layer_of()
    check(layer, operands())
    check(layer, operands(offset_groups=4))
    check(layer, operands())
    assert len(packs) == 3
    with dcnlib.cpu_isa("scalar"):
        check(layer, operands())
    check(layer, operands())


def test_a_weight_that_changes_with_every_call_is_not_packed_twice(packs):
    layer, arguments = layer_of(), operands()
    for _ in range(3):
        layer.weight.add_(1)
        assert torch.equal(layer(*arguments), expected(layer, *arguments))
    assert not packs


def test_what_is_kept_ends_with_the_weight():
    count = len(packing._frozen)
    layer = layer_of()
    check(layer, operands())
    assert len(packing._frozen) == count + 1
    frozen = packing._frozen[id(layer.weight)]
    assert frozen.state[2] is not None
    layer.weight.add_(1)
    layer(*operands())
    assert frozen.state[2] is None
    del layer
    gc.collect()
    assert len(packing._frozen) == count


def test_weights_of_inference_mode_work(packs):
    with torch.inference_mode():
        layer = layer_of()
        check(layer, operands())
        layer.weight.mul_(2)
        check(layer, operands())
    assert not packs


def test_channels_last_and_double_weights_work(packs):
    layer = layer_of().to(memory_format=torch.channels_last)
    check(layer, operands())
    assert not packs
    layer = layer.double().to(memory_format=torch.contiguous_format)
    check(layer, operands(torch.float64))


def test_no_memory_for_it_is_no_error(monkeypatch):
    def full(problem, weight):
        raise MemoryError

    monkeypatch.setattr(cpu, "pack_weight", full)
    check(layer_of(), operands())


def test_threads_share_a_weight(packs):
    layer, arguments = layer_of(), operands()
    right, wrong = expected(layer, *arguments), []

    def work():
        for _ in range(20):
            if not torch.equal(layer(*arguments), right):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= len(packs) <= 4


def test_freezing_finds_layers_and_leaves_the_rest():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), DeformConv2dPack(4, 4, 3))
    assert freeze(model) is model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"1.weight"}
    file = io.BytesIO()
    torch.save(model, file)  # nothing of it is in the file
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert id(again[1].weight) not in packing._frozen

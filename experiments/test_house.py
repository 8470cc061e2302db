"""test_house.py - house rules that can be tested: short lines, and imports that go one way."""
import ast
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parents[1]
SOURCES = [
    path
    for folder in (".", "data", "experiments")
    for path in HERE.glob(f"{folder}/*.*")
    if path.suffix in (".py", ".md", ".sh")]
MODULES = {
    ".".join(path.relative_to(HERE).with_suffix("").parts): path
    for path in SOURCES
    if path.suffix == ".py" and "test_" not in path.name}

ALLOWED = {  # by the start of a module's name: which of our modules it may import
    "didi": (),
    "model": (),
    "data.openwebtext": ("data.corpus", "data.text"),
    "data.quality": ("data.",),
    "data.corpus": ("data.signatures",),  # to make the default
    "data.": ("data.corpus",),
    "experiments.": ("",),
    "distill": ("didi", "model", "data.", "train_teacher"),  # for its table
    "": ("didi", "model", "data.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_have_100_columns_at_most(path):
    lines = path.read_text("utf-8").splitlines()

    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    source = MODULES[name].read_text("utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}

    allowed = next(ALLOWED[start] for start in ALLOWED if name.startswith(start))
    ours = imported & set(MODULES)
    assert [other for other in ours if not other.startswith(allowed)] == []


def test_an_import_writes_no_file(tmp_path):
    code = f"import {', '.join(MODULES)}"
    env = os.environ | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}

    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)

    assert os.listdir(tmp_path) == []

"""What a new system costs: its file, a line of ``SYSTEMS``, its configs, its test file; nothing else lists systems."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gans import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("dalle", "gans", "launch", "tools", "configs", "tests")
MODEL = "gan_int_cls"
NEWCOMER = {"gan_int_cls": "newcomer", "GANINTCLS": "Newcomer"}      # what the copy is called
TESTS = ("contract", "runs", "double_precision", "newcomer")
SECONDS = 600


def renamed(text: str) -> str:
    for old, new in NEWCOMER.items():
        text = text.replace(old, new)
    return text


def copy_under_another_name(root: Path, path: str) -> None:
    (root / renamed(path)).write_text(renamed((root / path).read_text()))


def add_line(path: Path, like: str) -> None:
    """Behind the line of ``path`` that matches, the same of the newcomer."""
    text = path.read_text()
    found = re.search(like, text, re.MULTILINE)
    path.write_text(text[:found.end()] + "\n" + renamed(found[0]) + text[found.end():])


def test_a_copy_of_a_system_under_another_name_keeps_every_promise(tmp_path):
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    for path in (f"gans/{MODEL}.py", f"tests/gans/test_{MODEL}.py", f"configs/gans/{MODEL}.yaml",
                 f"configs/gans/{MODEL}_shapes.yaml"):
        copy_under_another_name(tmp_path, path)
    add_line(tmp_path / "gans" / "__init__.py", rf'^    "{MODEL}": .*$')
    row = rf"^\|.*`{MODEL}`.*\|$"
    for page in tmp_path.rglob("*.md"):
        if re.search(row, page.read_text(), re.MULTILINE):
            add_line(page, row)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
               "newcomer and not two_processes", *(f"tests/gans/test_{name}.py" for name in TESTS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(tmp_path)}, timeout=SECONDS,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    own = (ROOT / "tests" / "gans" / f"test_{MODEL}.py").read_text().count("\ndef test_")
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= own + len(("companions", "phases", "pictures", "resume"))


def named_together(node: ast.AST) -> set[str]:
    """The systems that a list, tuple, set or dict names."""
    parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
    return {part.value for part in parts if isinstance(part, ast.Constant) and part.value in SYSTEMS}


def test_only_the_table_lists_systems():
    """Elsewhere they are found by it: a list by hand would lack the next one. Two names in a tuple are an example."""
    texts = {path: path.read_text() for folder in COPIED for path in (ROOT / folder).rglob("*.py")}
    lists = [f"{path.relative_to(ROOT)}:{node.lineno}" for path, text in texts.items()
             if sum(name in text for name in SYSTEMS) > 2
             for node in ast.walk(ast.parse(text)) if len(named_together(node)) > 2]
    assert [place for place in lists if not place.startswith("gans/__init__.py")] == []

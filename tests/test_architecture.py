"""Dependencies point one way, and only the engine knows accelerate and deepspeed: read from the imports themselves."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# files and pictures have one home each; exported models are found and loaded by the store, which knows no family
SHARED = {"dalle.files", "dalle.pictures", "dalle.words", "dalle.tensor_file", "dalle.store"}

# folder or file -> the project's own packages that it may import
ALLOWED = {
    "dalle/words.py": set(),
    "dalle/files.py": set(),
    "dalle/pictures.py": set(),
    "dalle/tensor_file.py": set(),
    "dalle/lookup.py": set(),
    "dalle/store.py": {"dalle.models", "dalle.data.tokenizer", "dalle.lookup", "dalle.errors", "dalle.files",
                       "dalle.tensor_file", "dalle.words"},
    "dalle/models": {"dalle.models", "dalle.tensor_file"},
    "dalle/data": {"dalle.data", "dalle.config", "dalle.errors", "dalle.text_file", "dalle.files",
                   "dalle.words"},
    "dalle/metrics": {"dalle.metrics", "dalle.data", "dalle.models", "dalle.errors", *SHARED},
    "dalle/training": {"dalle.training", "dalle.text_file", "dalle.data", "dalle.config", "dalle.errors", *SHARED},
    "dalle/sampling": {"dalle.sampling", "dalle.models", "dalle.data", "dalle.metrics", "dalle.config", "dalle.errors",
                       "dalle.lookup", *SHARED},
    "dalle/evaluation": {"dalle.evaluation", "dalle.sampling", "dalle.metrics", "dalle.models", "dalle.data",
                         "dalle.config", "dalle.errors", *SHARED},
    "dalle/tasks": {"dalle"},
    "gans": {"gans", "dalle"},
    "tools": {"gans", "dalle"},
    "launch": {"gans", "dalle"},
}
ENGINE_ONLY = {"accelerate", "deepspeed"}
CODE = ("dalle", "gans", "launch", "tools")
LONGEST_FILE = 450         # lines
LONGEST_COPY = 8           # lines of code in a row that may stand in two places


@cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", ALLOWED)
def test_arrows_point_one_way(folder):
    for path in sources(folder):
        ours = {name for name in imports(path) if name.split(".")[0] in CODE}
        wrong = {name for name in ours if not any(inside(name, package) for package in ALLOWED[folder])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_only_the_engine_knows_accelerate_and_deepspeed():
    for folder in CODE:
        for path in sources(folder):
            if path.parent == ROOT / "dalle/training/engines":
                continue
            known = {name.split(".")[0] for name in imports(path)} & ENGINE_ONLY
            assert not known, f"{path.relative_to(ROOT)} imports {sorted(known)}"


def module_graph() -> dict[str, set[str]]:
    """Module -> the project's own modules that it imports, wherever in the file, for type checkers alone too."""
    files = {}
    for path in (path for folder in CODE for path in sources(folder)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def owner(name: str, folder: str) -> str | None:
        """The module that ``name`` is, or is defined in; a command names its parts from its own ``folder`` on."""
        if f"{folder}.{name.split('.')[0]}" in files:
            name = f"{folder}.{name}"
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name or None

    return {module: {found for name in imports(path) if (found := owner(name, module.split(".")[0])) is not None}
            - {module} for module, path in files.items()}


def test_no_import_goes_round_in_a_circle():
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_python_folder_has_a_rule():
    covered = {Path(place) for place in ALLOWED}
    for path in (ROOT / "dalle").iterdir():
        if path.is_dir() and any(path.glob("*.py")):
            assert path.relative_to(ROOT) in covered


@pytest.mark.parametrize("folder", (*CODE, "tests"))
def test_no_file_is_too_long_to_be_read_at_once(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(folder)}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def lines_of_code(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that say something: no blank ones, comments, imports or closing brackets alone."""
    text = path.read_text()
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom)))
    imported = {number for node in imports for number in range(node.lineno, node.end_lineno + 1)}
    numbered = ((number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in numbered
            if number not in imported and not line.startswith("#") and any(letter.isalnum() for letter in line)]


def test_nothing_is_written_twice():
    """Outside of the tests, where an example may be spelt out again beside another."""
    seen: dict[tuple[str, ...], str] = {}
    copies = []
    for path in (path for folder in CODE for path in sources(folder)):
        lines = lines_of_code(path)
        for start in range(len(lines) - LONGEST_COPY):
            run = tuple(text for _, text in lines[start:start + LONGEST_COPY + 1])
            place = f"{path.relative_to(ROOT)}:{lines[start][0]}"
            if run in seen:
                copies.append(f"{place} = {seen[run]}")
            seen.setdefault(run, place)
    assert copies == []

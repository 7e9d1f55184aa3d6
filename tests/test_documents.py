"""What the pages say: what they name exists, their links lead somewhere, their examples run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for folder in (".", "configs", "dalle", "gans", "launch", "tests", "tools")
               for path in (ROOT.glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md")))
FRONT_PAGE_BYTES = 8192

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
# a path of the repository; one of an example that a reader would write (mine, SYSTEM) is none
PATH = re.compile(r"(?<![\w./~-])(?:dalle|gans|launch|tools|configs|tests|\.ci)/[\w./*-]*")
EXAMPLE = re.compile(r"\b(mine|my|test_mine|mine_shapes|SYSTEM\w*)\b")
PLACE = re.compile(r"`((?:dalle|gans|launch|tools|tests)/[\w./-]+\.py):\s+([\w.]+(?:,\s[\w.]+)*)`")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def anchors(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^a-z0-9_\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@cache
def defined(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, their members as Class.name and as name, and variables."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= names_of(node)
        if isinstance(node, ast.ClassDef):
            inside = set().union(*(names_of(below) for below in node.body))
            found |= inside | {f"{node.name}.{one}" for one in inside}
    return frozenset(found)


def names_of(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= FRONT_PAGE_BYTES


@every_page
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@every_page
def test_what_looks_like_a_path_is_one(page):
    found = {path.rstrip(".") for path in PATH.findall(page.read_text(encoding="utf-8")) if not EXAMPLE.search(path)}
    assert not [path for path in sorted(found)
                if not any(any(folder.glob(path.rstrip("/"))) for folder in (ROOT, page.parent))]


@every_page
def test_named_functions_are_where_it_says(page):
    missing = [f"{file}: {one}" for file, names in PLACE.findall(page.read_text(encoding="utf-8"))
               if not EXAMPLE.search(file) for one in re.split(r",\s", names)
               if not (ROOT / file).is_file() or one not in defined(ROOT / file)]
    assert not missing


@every_page
def test_commands_take_the_options_that_are_shown(page):
    """Any source that names the option will do: parsers are built in more than one place."""
    sources = "".join(path.read_text(encoding="utf-8") for folder in ("launch", "tools", "dalle", "tests")
                      for pattern in ("*.py", "*.sh") for path in (ROOT / folder).rglob(pattern))
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        lines = re.findall(r"python ((?:launch|tools)/\S+\.py)(.*)", block.replace("\\\n", " ")) \
            if language in ("bash", "") else []
        for script, rest in lines:
            assert (ROOT / script).is_file()
            options = re.findall(r"(?<=\s)--[a-z][a-z-]+", rest.partition("#")[0])
            assert not [option for option in options if f'"{option}"' not in sources], script


def test_every_config_has_its_line():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs == {one for one in re.findall(r"`(\w+/\w+\.yaml)`", text) if not EXAMPLE.search(one)}


def test_ten_questions_are_answered_in_three_files_each():
    text = (ROOT / "dalle" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Ten questions\n")[2].partition("\n## ")[0]
    answers = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    assert len(answers) == 10
    for answer in answers:
        places = PLACE.findall(answer)
        assert places and len({file for file, _ in places}) <= 3, answer
        assert set(PATH.findall(answer)) <= {file for file, _ in places}, answer


# -- the examples, where the quickstart would have left its runs: here tiny ones

EXAMPLES = [block for language, block in FENCE.findall((ROOT / "dalle" / "README.md").read_text(encoding="utf-8"))
            if language == "python"]


@pytest.fixture(scope="module")
def quickstart(workshop, commands, tmp_path_factory) -> Path:
    """data/shapes, configs/quickstart/dvae.yaml and runs/quickstart of the tiny job."""
    folder = tmp_path_factory.mktemp("quickstart")
    runs = folder / "runs" / "quickstart"
    for task in ("transformer", "clip"):
        assert commands["train"](workshop.config(task, runs)) == 0
    (runs / "dvae").symlink_to(workshop.folder / "runs" / "dvae")
    (folder / "data").mkdir()
    (folder / "data" / "shapes").symlink_to(workshop.folder / "data")
    (folder / "configs" / "quickstart").mkdir(parents=True)
    workshop.config("dvae", folder / "runs").rename(folder / "configs" / "quickstart" / "dvae.yaml")
    return folder


def run_example(block: str) -> dict:
    namespace = {"__name__": "example"}
    exec(compile(block, "dalle/README.md", "exec"), namespace)      # our own page
    return namespace


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(quickstart, number, monkeypatch):
    monkeypatch.chdir(quickstart)
    run_example(EXAMPLES[number])


def test_the_model_of_the_example_trains_and_comes_back(quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    own = run_example(next(block for block in EXAMPLES if "class MyTask" in block))
    trained(own, name="mine", data={**DATA, "caption": "none"})
    assert own["MyModel"].from_pretrained("runs/mine/model").config == own["MyConfig"]()


def test_the_system_of_the_example_trains_and_comes_back(quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    own = run_example(FENCE.findall((ROOT / "gans" / "README.md").read_text(encoding="utf-8"))[-1][1])
    trained(own, name="gan", data=DATA, text_encoder="runs/quickstart/clip")
    assert own["MyGenerator"].from_pretrained("runs/gan/model").config.image_size == 16


DATA = {"train": "data/shapes/train", "image_size": 16, "workers": 0}


def trained(own: dict, **settings: object) -> None:
    """Two steps of an example's task, by the lines of the page's own example of training."""
    config = own["MyRun"](train={"steps": 2, "batch_size": 8}, **settings)
    example = next(block for block in EXAMPLES if "Trainer(" in block)
    lines = [line for line in example.splitlines() if not line.startswith(("config =", "task ="))]
    namespace = {**own, "config": config, "task": own["MyTask"](config)}
    exec(compile("\n".join(lines), "dalle/README.md", "exec"), namespace)
    assert namespace["summary"].steps == 2

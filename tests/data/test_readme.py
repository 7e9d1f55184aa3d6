"""The page of dalle/data is complete: every file, every reason with its remedy, every extension of a picture."""

from dalle.data.members import IMAGE_EXTENSIONS
from dalle.data.reasons import REMEDIES, REPAIR
from tests.conftest import ROOT

FOLDER = ROOT / "dalle" / "data"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"\n{title}\n")[2].partition("\n## ")[0]


def test_the_map_names_every_file():
    names = {path.name for path in FOLDER.glob("*.py")} | {f"{path.parent.name}/" for path in FOLDER.glob("*/*.py")}
    inner = {path.name for path in FOLDER.glob("*/*.py")}
    listed = section("## The files")
    assert not [name for name in sorted((names | inner) - {"__init__.py"}) if f"`{name}`" not in listed]


def test_every_reason_stands_there_with_its_remedy():
    rows = TEXT.replace("\\|", "|").splitlines()
    assert not [reason for reason, what in REMEDIES.items() if f"| `{reason}` | {what} |" not in rows]
    assert REPAIR in TEXT


def test_every_extension_of_a_picture_in_a_shard_is_listed():
    listed = section("## A sample")
    assert not [name for name in IMAGE_EXTENSIONS if f".{name}`" not in listed]

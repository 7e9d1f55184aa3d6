"""The tables that a family of models can join: nothing is imported before it is asked for, no name means two things."""

import sys
from types import ModuleType

import pytest
import torch

import gans
from dalle.config import load_config
from dalle.errors import UserError
from dalle.lookup import LazyTable
from dalle.models.base import CONFIG_FILE
from dalle.sampling import rerank
from dalle.store import GENERATORS, RERANKERS, load_generator
from dalle.tasks import RUNS, TASKS, add_tasks


@pytest.fixture
def family(monkeypatch) -> ModuleType:
    """A module ``family`` that can be imported, and tables that forget what joins them."""
    for table in (RUNS, TASKS, GENERATORS, RERANKERS):
        monkeypatch.setattr(table, "_places", dict(table._places))
    module = ModuleType("family")
    module.Run, module.Other = type("Run", (), {}), type("Other", (), {})
    module.load = lambda folder, *where: (folder, where)
    monkeypatch.setitem(sys.modules, "family", module)
    return module


def test_an_entry_is_imported_when_it_is_read_and_not_before(family):
    table = LazyTable({"here": ("family", "Run"), "dotted": ("family", "Run.__name__"), "gone": ("no.module", "A")})
    assert list(table) == ["here", "dotted", "gone"] and len(table) == 3 and "gone" in table and "else" not in table
    assert table["here"] is family.Run and table["dotted"] == "Run"
    with pytest.raises(ModuleNotFoundError):
        table["gone"]
    with pytest.raises(KeyError):
        table["else"]


def test_the_same_again_is_nothing_new_and_a_taken_name_is_refused_with_all_that_came_with_it(family):
    table = LazyTable({"one": ("family", "Run")})
    table.add({"one": ("family", "Run")})
    with pytest.raises(ValueError, match="'one' is taken by family.Run, it cannot become family.Other"):
        table.add({"two": ("family", "Run"), "one": ("family", "Other")})
    assert list(table) == ["one"]


def test_tasks_join_both_columns(family):
    add_tasks({"new": ("family", "Run", "Other")})
    add_tasks({"new": ("family", "Run", "Other")})
    assert RUNS["new"] is family.Run and TASKS["new"] is family.Other
    with pytest.raises(ValueError, match="'dvae' is taken"):
        add_tasks({"dvae": ("family", "Run", "Other")})
    for wrong in (("family", "Run", "Run"), ("family", "Other", "Other")):
        with pytest.raises(ValueError, match="'new' is taken"):
            add_tasks({"newer": ("family", "Run", "Other"), "new": wrong})
        assert "newer" not in RUNS and "newer" not in TASKS


def test_a_folder_of_a_kind_that_joined_is_loaded_by_its_loader(family, tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "new"}')
    with pytest.raises(UserError, match="holds a 'new' model; sampling needs a generator"):
        load_generator(tmp_path)
    with pytest.raises(UserError, match="holds a 'new' model; --rerank needs a 'clip'"):
        rerank.load_reranker(str(tmp_path))
    GENERATORS.add({"new": ("family", "load")})
    RERANKERS.add({"new": ("family", "load")})
    assert load_generator(tmp_path, "cpu", torch.float32) == (tmp_path, ("cpu", torch.float32))
    assert rerank.load_reranker(str(tmp_path), "cpu") == (tmp_path, ("cpu",))


def test_a_gan_before_its_family_has_joined_names_the_remedy(family, tmp_path, monkeypatch):
    for table in (RUNS, GENERATORS, RERANKERS):
        own = {name: place for name, place in table._places.items() if place[0].startswith("dalle.")}
        monkeypatch.setattr(table, "_places", own)
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "attngan"}')
    (tmp_path / "run.yaml").write_text("task: attngan\n")
    asks = [lambda: load_generator(tmp_path), lambda: rerank.load_reranker(str(tmp_path)),
            lambda: load_config(tmp_path / "run.yaml", [], RUNS)]
    for ask in asks:
        with pytest.raises(UserError, match=r"`import gans; gans.register\(\)` adds the GAN family$"):
            ask()
    gans.register()
    with pytest.raises(UserError, match="or open_clip:NAME/TAG$"):
        rerank.load_reranker(str(tmp_path))


def test_the_gans_join_as_often_as_they_like(family, tmp_path):
    gans.register()
    gans.register()
    assert gans.SYSTEMS.keys() <= RUNS.keys()
    (tmp_path / "run.yaml").write_text("task: atngan\n")
    with pytest.raises(UserError, match="did you mean 'attngan'"):
        load_config(tmp_path / "run.yaml", [], RUNS)

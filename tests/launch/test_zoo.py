"""The zoo: its rows from a run's log, what each set is measured with, its table."""

import json
from pathlib import Path

import pytest

from dalle.errors import UserError


@pytest.fixture
def zoo(commands, monkeypatch):
    """The script as a module."""
    import importlib.util

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "launch"))     # for its parts beside it
    spec = importlib.util.spec_from_file_location("zoo_command", Path(__file__).parents[2] / commands["zoo"].path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_of(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return path


def test_a_row_reads_the_newest_start_of_the_log(zoo, tmp_path):
    old = {"step": 50, "samples_per_second": 1.0, "seconds_per_step": 9.0, "evaluation/judge/object_colour": 0.9}
    log = log_of(tmp_path / "log.jsonl", {"event": "start"}, old, {"event": "start"},
                 {"step": 10, "samples_per_second": 100.0, "seconds_per_step": 0.5},
                 {"step": 10, "evaluation/judge/object_colour": 0.25},
                 {"step": 30, "samples_per_second": 300.0, "seconds_per_step": 0.25},
                 {"step": 30, "evaluation/judge/object_colour": 0.5})
    row = zoo.Row("x", "1234.56789")
    zoo.read_log(log, row)
    assert (row.steps, row.seconds, row.trained_a_second) == (30, 10 * 0.5 + 20 * 0.25, 200.0)
    assert row.curve == [(10, 0.25), (30, 0.5)]


def test_a_log_without_training_is_no_row(zoo, tmp_path):
    with pytest.raises(UserError, match="holds no line of a training"):
        zoo.read_log(log_of(tmp_path / "log.jsonl", {"event": "start"}), zoo.Row("x", "1"))


def test_the_table_has_a_line_for_each_row_and_a_dash_for_what_is_missing(zoo, tmp_path):
    rows = [zoo.Row("good", "1111.11111", processor_seconds=300, steps=1000, parameters={"g": 5, "d": 7},
                    figures={"judge/object_colour": 0.5, "judge/place": 0.1, "fid-clip:x": 0.25}, trained_a_second=99.6,
                    painted_a_second=12.3, curve=[(1, 0.1), (2, 0.5)]),
            zoo.Row("better", "2222.22222", figures={"judge/object_colour": 0.75, "ms-ssim-real": 0.34},
                    protocol={"ms-ssim-real": '{"image_size": 64}'})]
    zoo.write_leaderboard(rows, tmp_path)
    lines = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert lines[0] == ("| system | steps | core minutes | judge/object_colour | fid-clip:x | parameters | "
                        "pictures/s trained | pictures/s painted |")
    assert lines[2].startswith("| better (2222.22222) |") and "| - |" in lines[2]
    assert lines[3] == "| good (1111.11111) | 1,000 | 5.0 | 0.5 | 0.25 | 12 | 100 | 12 |"
    assert "1 in 8" in lines[-1] and lines[-1].endswith("Real pictures: ms-ssim: 0.34 at 64 px.")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert [row["system"] for row in json.loads((tmp_path / "leaderboard.json").read_text())] == ["better", "good"]


def test_measuring_again_keeps_what_the_training_cost(zoo, tmp_path, monkeypatch):
    log_of(tmp_path / "log.jsonl", {"event": "start"}, {"step": 9, "samples_per_second": 2.0, "seconds_per_step": 1.0})
    monkeypatch.setattr(zoo, "train", lambda config, arguments, row: tmp_path)
    monkeypatch.setattr(zoo, "planned_parameters", lambda config: {"generator": 3})
    monkeypatch.setattr(zoo, "measure", lambda run, arguments, row: row.figures.update(fid=1.0))
    monkeypatch.setattr(zoo, "painting_speed", lambda run, data: 7.0)
    known = tmp_path / "row.json"
    known.write_text(json.dumps({"processor_seconds": 120.0}))
    for given, seconds in (["--measure"], 120.0), ([], 0.0):
        row = zoo.make_row("attngan", zoo.parse(given), known)
        assert (row.processor_seconds, row.steps, row.figures, row.painted_a_second) == (seconds, 9, {"fid": 1.0}, 7.0)


def test_unknown_systems_and_an_empty_zoo_are_refused(zoo, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["zoo.py", "--only", "attngam", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="'attngam' is no system that paints; known: .*attngan"):
        zoo.main()
    monkeypatch.setattr("sys.argv", ["zoo.py", "--table", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="holds no row yet"):
        zoo.main()


def test_a_table_is_the_leaderboard_unless_another_is_named(zoo):
    assert [zoo.parse(given).table for given in ([], ["--table"], ["--table", "leaderboard"], ["--table", "papers"])] \
        == [None, "leaderboard", "leaderboard", "papers"]


def test_encoders_are_not_in_the_zoo(zoo):
    systems = zoo.chosen(zoo.parse(["--transformer", "nowhere"]))
    assert "attngan" in systems and "damsm" not in systems and "transformer" not in systems


def test_each_set_has_its_pictures_its_clip_and_its_systems(zoo):
    arguments = zoo.parse(["--set", "emoji", "--transformer", "nowhere"])
    assert (arguments.data, arguments.clip, str(arguments.out)) == ("data/emoji/train", "runs/emoji/clip",
                                                                    "runs/zoo/emoji")
    assert zoo.parse([]).out != arguments.out and zoo.parse(["--data", "mine"]).data == "mine"
    systems = zoo.chosen(arguments)
    assert "attngan" in systems and "acgan" not in systems      # emoji have no classes


def test_without_a_judge_rows_are_ranked_by_r_precision_and_have_no_curves(zoo, tmp_path):
    rows = [zoo.Row("good", "1111.11111", figures={"r-precision-clip:x": 0.25}),
            zoo.Row("better", "2222.22222", figures={"r-precision-clip:x": 0.5})]
    zoo.write_leaderboard(rows, tmp_path)
    table = (tmp_path / "leaderboard.md").read_text()
    assert table.index("better") < table.index("good") and table.endswith("By chance: r-precision: 1 in 100.\n")
    assert not (tmp_path / "curves.png").exists()

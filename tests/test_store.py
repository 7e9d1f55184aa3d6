import json

import pytest

from dalle.store import Origin, origin_of


def test_an_export_tells_its_checkpoint_or_the_run_does(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert origin_of(folder) == Origin(None, None)
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    (checkpoint / "net").mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 7}))
    assert origin_of(folder) == Origin(7, "raw")
    (folder / "source.json").write_text(json.dumps({"step": 9, "averaged": True}))
    assert origin_of(folder) == Origin(9, "EMA")


@pytest.mark.parametrize("text", ["[" * 100_000, "not json", "[1]", "\x80"])
def test_a_note_that_cannot_be_read_tells_nothing(tmp_path, text):
    (tmp_path / "source.json").write_text(text, encoding="latin-1")
    assert origin_of(tmp_path) == Origin(None, None)

"""The quickstart's bookkeeping: its stages are commands that exist, and its table shows what the logs say."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_command", ROOT / "launch/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dataset", ["shapes", "emoji"])
def test_every_stage_runs_a_script_of_the_project_on_files_that_exist(quickstart, dataset):
    make_stages, runs = quickstart.STAGES[dataset]
    stages = make_stages()
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        script, *arguments = stage.command
        assert (ROOT / script).is_file()
        for argument in arguments:
            if argument.startswith("configs/"):
                assert (ROOT / argument).is_file()
        assert stage.product.startswith(("data/", str(runs)))


def test_the_newest_figures_of_the_logs_are_shown(quickstart, tmp_path):
    logs = {
        "dvae": [{"validation/psnr": 20.0, "validation/codes_used": 9, "validation/perplexity": 3.0},
                 {"loss": 1.0},
                 {"validation/psnr": 31.25, "validation/codes_used": 900, "validation/perplexity": 80.0}],
        "transformer": [{"validation/bits_per_image_token": 1.5}],
        "clip": [{"validation/recall@1_in_64": 0.875}],
    }
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "judge.json").write_text(json.dumps({"unranked": 0.8, "best_by_clip": 0.95, "candidates": 16}))
    console = Console(width=120, record=True, file=io.StringIO())
    quickstart.report({"dvae": 60.0, "clip": 30.0}, tmp_path, console)
    text = console.export_text()
    for shown in ("31.2 dB", "900 (perplexity 80)", "1.50 bits", "87.5 %", "80.0 %", "95.0 %", "best of 16", "1.5 min"):
        assert shown in text


def test_a_failed_stage_ends_with_its_name(quickstart):
    stage = quickstart.Stage("data", "nothing", ["tools/make_shards.py", "shapes"], "data/none")   # --out is missing
    with pytest.raises(UserError, match="'data' ended with status 2"):
        quickstart.run_stage(stage, Console(file=io.StringIO()))


def test_an_unknown_data_set_is_refused_before_anything_is_installed(tmp_path):
    result = subprocess.run(["bash", str(ROOT / "launch/quickstart.sh"), "cats"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "cats" in result.stderr and "shapes|emoji" in result.stderr

"""Tables, comparisons and plots of rows that are made up."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from dalle.errors import UserError
from dalle.evaluation.job import Results
from dalle.evaluation.plots import draw_plots
from dalle.evaluation.protocol import Protocol, Row, differences
from dalle.evaluation.report import check_out, compare, glance, labels, read_rows, to_json, write_report

PROTOCOL = Protocol(tool="tessera 1", samples=512, seed=0, image_size=64, captions="val", captions_fingerprint="c" * 32,
                    reference="val", reference_fingerprint="f" * 32, references=1000, extractor="clip:q",
                    extractor_digest="e" * 16, resize="bicubic", settings="temperature 1.0", step=3, weights="EMA",
                    precision="fp32", blur=0.0, candidates=1)


def rows(*blurs: float, counts=(1, 4)) -> list[Row]:
    return [Row(family, f"{family}-clip:q", 10 + blur - count, error, replace(PROTOCOL, blur=blur, candidates=count))
            for family, error in (("fid", None), ("is", 0.5)) for blur in blurs for count in counts]


def test_rows_survive_the_file(tmp_path):
    results = Results({"kind": "stub", "path": "a|b"}, rows(0.0, 1.0), left_out={"psnr": "measures reconstructions"},
                      unreadable=["0.tar:7: truncated_image"], unreadable_captions={"empty_caption": 2})
    written = write_report(results, tmp_path)
    assert {path.name for path in written} == {"results.json", "results.md", "blur.png", "best_of_n.png"}
    assert read_rows(tmp_path / "results.json") == results.rows
    assert json.loads((tmp_path / "results.json").read_text())["unreadable_pictures"] == {
        "count": 1, "first": ["0.tar:7: truncated_image"]}
    text = (tmp_path / "results.md").read_text()
    for part in ("0.tar:7: truncated_image", "empty_caption 2", "Left out: psnr (measures reconstructions)",
                 "512 samples of 64 px", "clip:q (eeeeeeeeeeee)", "step 3, EMA weights", "1,000 of val (ffffffffffff)"):
        assert part in text


@pytest.mark.parametrize("name", ["results.json", "results.md", "blur.png", "best_of_n.png"])
def test_a_file_of_the_users_in_the_way_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not of an evaluation and would be overwritten"):
        check_out(tmp_path)
    (tmp_path / name).unlink()
    write_report(Results({"kind": "stub"}, rows(0.0, 1.0)), tmp_path)
    check_out(tmp_path)


def test_the_glance_has_a_line_for_each_metric_and_blur():
    lines = glance(rows(0.0, 2.0)).splitlines()
    assert lines[0] == "| metric | blur | 1 candidate | best of 4 |"
    assert lines[2:] == ["| fid-clip:q | 0 | 9 | 6 |", "| fid-clip:q | 2 | 11 | 8 |",
                         "| is-clip:q | 0 | 9 ± 0.5 | 6 ± 0.5 |", "| is-clip:q | 2 | 11 ± 0.5 | 8 ± 0.5 |"]


@pytest.mark.parametrize(("change", "reason"), [
    ({"samples": 500}, "sample count: 512 against 500"),
    ({"extractor_digest": "0"}, "hash of the extractor's weights"),
    ({"resize": "bilinear"}, "resize filter: bicubic against bilinear"),
    ({"reference_fingerprint": "0"}, "reference split"),
    ({"image_size": 32}, "image size: 64 against 32"),
    ({"few_samples": True}, "fewer samples"),
    ({"tool": "tessera 2"}, "tool and version"),
])
def test_another_measure_is_not_comparable(change, reason):
    assert reason in "; ".join(differences(PROTOCOL, replace(PROTOCOL, **change)))


def test_another_model_is():
    other = replace(PROTOCOL, step=9, weights="raw", settings="guidance 3.0", precision="bf16", reference="elsewhere")
    assert differences(PROTOCOL, other) == []


def test_comparing_three_files(tmp_path):
    for name, change in (("a", {}), ("b", {"step": 9}), ("c", {"extractor": "inception", "extractor_digest": "0"})):
        own = [replace(row, protocol=replace(row.protocol, **change),
                       metric=row.metric.replace("clip:q", change.get("extractor", "clip:q")))
               for row in rows(0.0, counts=(1,) if name == "b" else (1, 4))]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(to_json(Results({"kind": "x"}, own))))
    paths = [tmp_path / name / "results.json" for name in "abc"]
    lines = compare(paths).splitlines()
    assert lines[0] == "| metric | best of N | blur | a | b | c | comparable |"
    assert lines[2].startswith("| fid-clip:q / fid-inception | 1 | 0 | 9 | 9 | 9 | NO: a and c: extractor: ")
    assert lines[3].startswith("| fid-clip:q / fid-inception | 4 | 0 | 6 | - | 6 | NO: ")
    assert "| yes |" in compare(paths[:2]).splitlines()[2] and "only in a" in compare(paths[:2]).splitlines()[3]
    assert "step 9, EMA weights" in compare(paths)
    with pytest.raises(UserError, match="at least two"):
        compare(paths[:1])


def test_files_are_told_apart_by_as_much_of_the_path_as_it_takes(tmp_path):
    assert labels([tmp_path / "a/results.json", tmp_path / "b/results.json"]) == ["a", "b"]
    assert labels([tmp_path / "a/x/results.json", tmp_path / "b/x/results.json"]) == ["a/x", "b/x"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "rows": [{}]}', '{"format": 1, "rows": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="not a results.json"):
        read_rows(tmp_path / "x.json")


def test_an_older_format_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"format": 0, "rows": []}')
    with pytest.raises(UserError, match="format 0, this program reads 1"):
        read_rows(tmp_path / "x.json")


def test_one_point_is_no_curve_and_an_old_plot_does_not_stay(tmp_path):
    assert len(draw_plots(rows(0.0, 1.0), {}, tmp_path)) == 2
    assert draw_plots(rows(0.0, counts=(1,)), {}, tmp_path) == [] and not list(tmp_path.iterdir())


def test_plots_say_what_their_axes_are(tmp_path):
    from dalle.evaluation.plots import blur_figure, candidates_figure

    figure = blur_figure(rows(0.0, 1.0, 2.0))
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "FID (lower is better)", "Inception Score (higher is better)"]
    assert all("radius (pixels)" in axis.get_xlabel() for axis in figure.axes)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["1 candidate", "best of 4"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [9, 10, 11]
    caption = " ".join(figure.get_supxlabel().split())
    assert "512 samples of 64 px" in caption and "features clip:q (eeeeeeeeeeee)" in caption
    figure = candidates_figure(rows(0.0, 1.0))
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 4] and list(figure.axes[0].lines[0].get_ydata()) == [9, 6]
    figure.savefig(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 600

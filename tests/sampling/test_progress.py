"""That painting is seen to go on, by a transformer, by a GAN and in the lines."""

import pytest
import torch

from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling import progress
from dalle.sampling.decode import sample_codes
from dalle.sampling.progress import PaintingProgress


def test_codes_are_told_one_after_another():
    torch.manual_seed(0)
    model = TextToImageTransformer(TransformerConfig(dim=16, depth=1, heads=2, text_length=3, num_text_tokens=9,
                                                     grid=(2, 2), num_codes=5))
    told = []
    sample_codes(model, torch.ones(1, 3, dtype=torch.int64), range(3), batch_size=2, on_progress=told.append)
    assert told == [0.5, 1, 1.5, 2, 2.25, 2.5, 2.75, 3]          # four codes of two candidates, then of one


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_lines_where_there_is_no_terminal(monkeypatch, capsys, seconds):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    report = PaintingProgress()
    for done in (0.5, 1.5, 4):
        report(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("painted 4 of 4 pictures in ")
    assert [line.split(",")[0] for line in lines[:-1]] == (
        [] if seconds else ["painted 0 of 4 pictures (12%)", "painted 1 of 4 pictures (38%)"])

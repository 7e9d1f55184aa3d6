"""An evaluation of the stub generator that is slow enough to be killed: ``worker.py SPLIT OUT CACHE``."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from evaluation_stubs import MeanColour, Redness, StubGenerator, stub_job  # noqa: E402

from dalle.evaluation import measure, pictures  # noqa: E402
from dalle.evaluation.processes import Processes  # noqa: E402
from dalle.store import Origin  # noqa: E402


class Slow(StubGenerator):
    def generate(self, captions, seeds, **options):
        time.sleep(0.2)
        return super().generate(captions, seeds, **options)


measure.load_extractor = lambda spec, device: MeanColour()
measure.name_of = lambda spec, identity: "redness"
pictures.BLOCK_CAPTIONS = 2
split, out, cache = sys.argv[1:]
measure.evaluate_generator(stub_job(split, Path(out), Path(cache)), Slow(), Redness(), Origin(7, "EMA"), Processes(),
                           lambda line: None)

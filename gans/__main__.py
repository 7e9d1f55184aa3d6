"""``python -m gans schema``: the JSON Schema of every kind of run, the GANs' included, for editors.

``python -m gans settings``: the same for readers, as configs/SETTINGS.md.
"""

import json
import sys

import gans
from dalle.config import json_schema
from dalle.errors import UserError, run_command
from dalle.settings import settings_reference


def main() -> None:
    if sys.argv[1:] not in (["schema"], ["settings"]):
        raise UserError("usage: python -m gans schema|settings")
    gans.register()
    from dalle.tasks import RUNS

    if sys.argv[1] == "settings":
        print(settings_reference(RUNS), end="")
    else:
        print(json.dumps(json_schema(RUNS), indent=2))


if __name__ == "__main__":
    run_command(main)

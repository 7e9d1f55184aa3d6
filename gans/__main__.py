"""``python -m gans schema``: the JSON Schema of every kind of run, the GANs' included, for editors."""

import json
import sys

import gans
from dalle.config import json_schema
from dalle.errors import UserError, run_command


def main() -> None:
    if sys.argv[1:] != ["schema"]:
        raise UserError("usage: python -m gans schema")
    gans.register()
    from dalle.tasks import RUNS

    print(json.dumps(json_schema(RUNS), indent=2))


if __name__ == "__main__":
    run_command(main)

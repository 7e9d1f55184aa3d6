#!/usr/bin/env bash
# Passes the tests: bash tests/run.sh [pytest arguments]. Sets up .venv on the first run.
set -euo pipefail
source "$(dirname "$0")/../launch/setup.sh" test
echo "== lint"
"$python" -m ruff check .
echo "== tests"
exec "$python" -m pytest -q -rs --durations=15 "$@"

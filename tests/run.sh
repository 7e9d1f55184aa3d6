#!/usr/bin/env bash
# Passes the tests: bash tests/run.sh [pytest arguments]. Sets up .venv on the first run.
# Without arguments all of them, in up to four processes of one thread each, a file's tests in one of them.
set -euo pipefail
source "$(dirname "$0")/../launch/setup.sh" test
echo "== lint"
"$python" -m ruff check .
echo "== tests"
if [ $# -eq 0 ]; then
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # two threads of each process would wait for one another
    set -- -n "$((cores < 4 ? cores : 4))" --dist loadfile
fi
exec "$python" -m pytest -q -rs --durations=15 "$@"

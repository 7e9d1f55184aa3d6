#!/usr/bin/env bash
# The main job on this machine, from nothing to a gallery: bash launch/quickstart.sh [shapes|emoji]
# Can be run again: what is done is not repeated.
set -euo pipefail
case "${1:-shapes}" in
    shapes|emoji) ;;
    *) echo "error: unknown data set '$1'; usage: bash launch/quickstart.sh [shapes|emoji]" >&2; exit 2 ;;
esac
export TESSERA_STARTED="${TESSERA_STARTED:-$(date +%s)}"
source "$(dirname "$0")/setup.sh" ""     # "": the caller's arguments are not its own
exec "$python" launch/quickstart.py "$@"

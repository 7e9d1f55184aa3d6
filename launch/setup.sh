# Sourced by the project's two commands: makes .venv beside pyproject.toml and installs the project into it, once.
# Usage: source launch/setup.sh [EXTRA]      (EXTRA: an optional-dependencies group, such as "test")
# Afterwards $python is the interpreter to use and the working directory is the project's root.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${TESSERA_PYTHON:-}" python3.12 python3.11 python3.13 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$candidate" -c 'import venv, ensurepip' 2>/dev/null || continue
        echo "$candidate"
        return
    done
    echo "error: Python 3.11 or newer with its venv module is needed (set TESSERA_PYTHON to its path)" >&2
    return 2
}

install_project() {
    local extra="$1" wanted interpreter stamp=.venv/.tessera-installed
    wanted="$(cat pyproject.toml | cksum) $extra"
    if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then return; fi
    if [ ! -x .venv/bin/python ]; then
        echo "== setup: virtual environment .venv"
        interpreter="$(find_python)"
        "$interpreter" -m venv .venv
    fi
    echo "== setup: installing the project and its packages into .venv (about 6 GB, one to three minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}" 2> >(grep -v '^WARNING: Location' >&2)
    echo "$wanted" >> "$stamp"
}

install_project "${1:-}"
python="$PWD/.venv/bin/python"
export PATH="$PWD/.venv/bin:$PATH"

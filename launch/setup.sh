# Makes .venv with the locked versions if it is missing or out of date. Source it: it sets PYTHON.
# An interrupted or outdated install is completed; a complete one is used as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

usable() { # whether this Python is one we support and can make environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

setup() {
    local stamp want python candidate
    stamp=.venv/.installed
    want=$(cksum <requirements.lock)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        for candidate in python3 python3.11 python3.12 python3.10; do
            if usable "$candidate"; then
                python=$candidate
                break
            fi
        done
        if [ -z "${python:-}" ]; then
            echo "error: no Python 3.10, 3.11 or 3.12 with the venv module found on PATH" >&2
            return 1
        fi
        echo "== installing into .venv with $("$python" --version) (once; a few minutes)"
        if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            rm -rf .venv
            "$python" -m venv .venv || return 1
        fi
        .venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 || return 1
        DS_BUILD_OPS=0 .venv/bin/pip install --quiet --disable-pip-version-check \
            -r requirements.lock || return 1
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
            --no-build-isolation --editable . || return 1
        echo "$want" >"$stamp"
    fi
    PYTHON=.venv/bin/python
}

setup || exit 1

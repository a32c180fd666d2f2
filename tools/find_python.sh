#!/bin/sh
# Print the path of a Python >= 3.12 that can make virtual environments, or say why there is none.
#
#     sh tools/find_python.sh
#
# $PYTHON, if set, is the only candidate. A candidate counts only if it really runs: a version
# manager's shim may carry the right name and fail.

set -u

runs() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3.12 python3.13 python3.14 python3
    for candidate in "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/*/bin/python3.1[2-9]; do
        set -- "$@" "$candidate"
    done
fi

for candidate in "$@"; do
    if runs "$candidate"; then
        # The real file, so that a shim cannot change its mind later.
        exec "$candidate" -c 'import sys; print(sys.executable)'
    fi
done

cat >&2 <<MESSAGE
error: no Python >= 3.12 with the modules venv and ensurepip was found.
Tried: $*
Remedy: install Python 3.12 or newer (on Debian and Ubuntu: python3 and python3-venv), or name one:
    make setup PYTHON=/path/to/python3.12
MESSAGE
exit 1

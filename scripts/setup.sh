#!/bin/sh
# Make a virtual environment and install into it: setup.sh PYTHON VENV PIP-ARGUMENTS...
# Where Debian or Ubuntu keeps a needed part of Python in a package of its own, that package is installed
# if we may, and named if we may not.
set -eu
python=$1 venv=$2
shift 2

need() { # package, why
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y --no-install-recommends "$1" >/dev/null 2>&1 ||
            { apt-get update >/dev/null && apt-get install -y --no-install-recommends "$1" >/dev/null; }
    else
        echo "$2 is missing; install it first, on Debian and Ubuntu with: apt-get install $1" >&2
        exit 4
    fi
}

# The tests of the gateway's page drive a real browser; they are skipped where there is none.
want_browser() {
    for name in chromium chromium-browser google-chrome; do
        ! command -v "$name" >/dev/null || return 0
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get install -y --no-install-recommends chromium ||
            { apt-get update && apt-get install -y --no-install-recommends chromium; }; } >/dev/null 2>&1 && return 0
    fi
    echo "There is no Chromium; the tests of the page are skipped. On Debian: apt-get install chromium" >&2
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    { echo "$python does not run; name a Python with: make PYTHON=python3.11 ..." >&2; exit 4; }
case $version in
3.10 | 3.11 | 3.12 | 3.13) ;;
*) echo "Python $version is not supported; name one of 3.10 to 3.13 with: make PYTHON=python3.11 ..." >&2; exit 4 ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "python$version-venv" "Python's venv module"
# Triton's Python backend loads the shared library of the interpreter.
"$python" - <<'END' || need "libpython$version" "The shared library of Python $version"
import ctypes, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
for folder in (sysconfig.get_config_var("LIBDIR") or "", sys.base_prefix + "/lib", ""):
    try:
        ctypes.CDLL(folder + "/" + name if folder else name)
        break
    except OSError:
        pass
else:
    sys.exit(1)
END
case "$*" in *"[dev]"*) want_browser ;; esac
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
exec "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"

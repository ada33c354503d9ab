#!/bin/sh
# MuJoCo renders videos without a screen through EGL; on Debian that takes three small packages.
set -eu
packages="libegl1 libopengl0 libgl1-mesa-dri"

[ "$(uname)" = Linux ] || exit 0
command -v dpkg-query >/dev/null || exit 0
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

echo "== rendering videos without a screen needs the Debian packages:$missing"
if [ "$(id -u)" = 0 ]; then run=""; elif command -v sudo >/dev/null; then run="sudo"; else
    echo "error: please install them as root: apt-get install --no-install-recommends$missing" >&2
    exit 2
fi
echo "== installing them: ${run:+$run }apt-get install --no-install-recommends$missing"
$run apt-get update -qq
$run env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing

#!/bin/sh
# What tests need beyond Python: installed with apt where that is possible, else said loudly.
missing=""
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v chromium >/dev/null || missing="$missing chromium"
command -v ip >/dev/null || missing="$missing iproute2"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing$missing with apt …"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 300 apt-get update -qq && timeout 900 apt-get install -y -qq --no-install-recommends $missing; } </dev/null >/dev/null 2>&1 && exit 0
fi
echo "SKIPPED below: tests that need$missing, which could not be installed here" >&2
exit 0

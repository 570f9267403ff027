#!/usr/bin/env bash
# Runs the object-store conformance tests against Debian's Ceph radosgw, a store people use in production.
# Installs the packages when they are missing, starts a one-node cluster in a temporary folder on
# loopback, creates a user, runs the tests marked `radosgw`, and stops and removes everything but the packages.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
wait_seconds=120

die() { echo "radosgw.sh: $*" >&2; exit 1; }

install_packages() {
  local tool missing=""
  for tool in ceph ceph-mon ceph-osd ceph-mgr radosgw radosgw-admin; do
    command -v "$tool" >/dev/null || missing=yes
  done
  [ "$missing" ] || return 0
  command -v apt-get >/dev/null || die "needs Debian's ceph packages, and there is no apt-get here"
  local sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo"
  { $sudo apt-get update -qq \
      && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        ceph-mon ceph-osd ceph-mgr radosgw ceph-common; } >"$dir/apt.log" 2>&1 \
    || { tail -n 20 "$dir/apt.log" >&2; die "cannot install ceph-mon ceph-osd ceph-mgr radosgw ceph-common"; }
}

pids=()
stop() {
  [ ${#pids[@]} -eq 0 ] || { kill -9 "${pids[@]}" && wait "${pids[@]}"; } 2>/dev/null || true
  rm -rf "$dir"
}
start() { "$@" -f -c "$CEPH_CONF" >"$dir/$1.out" 2>&1 & pids+=($!); }

until_ok() { # until_ok WHAT COMMAND…
  local what="$1" deadline=$((SECONDS + wait_seconds)); shift
  until "$@" >/dev/null 2>"$dir/wait.err"; do
    [ $SECONDS -lt $deadline ] || { tail -n 5 "$dir"/*.out "$dir"/*.log "$dir/wait.err" >&2; die "$what did not come up"; }
    sleep 0.2
  done
}

dir="$(mktemp -d)"
trap stop EXIT
trap 'exit 130' INT TERM
[ -x "$python" ] || die "no Python at $python; set PYTHON to one that has the dev extra installed"
install_packages

read -r mon_port gw_port < <("$python" -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in held))')
fsid="$(cat /proc/sys/kernel/random/uuid)"
osd="$(cat /proc/sys/kernel/random/uuid)"
export CEPH_CONF="$dir/ceph.conf"
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon_port]
public addr = 127.0.0.1
keyring = $dir/keyring
run dir = $dir
log file = $dir/\$name.log
admin socket = $dir/\$name.asok
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd
bluestore block size = 8589934592
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default pg num = 8
mon allow pool size one = true
CONF
mkdir "$dir/mon" "$dir/mgr" "$dir/osd"

ceph-authtool --create-keyring "$dir/keyring" >"$dir/mkfs.out" 2>&1
for who in mon. mgr.a osd.0 client.admin; do
  ceph-authtool "$dir/keyring" -n "$who" --gen-key --cap mon "allow *" --cap mgr "allow *" --cap osd "allow *"
done
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon_port]" "$dir/monmap" >>"$dir/mkfs.out"
ceph-mon -i a --mkfs --monmap "$dir/monmap" --keyring "$dir/keyring" >>"$dir/mkfs.out" 2>&1 || { cat "$dir/mkfs.out" >&2; die "ceph-mon --mkfs failed"; }
start ceph-mon -i a
until_ok "the monitor" timeout 10 ceph osd new "$osd"
start ceph-mgr -i a
ceph-osd -i 0 --mkfs --osd-uuid "$osd" >>"$dir/mkfs.out" 2>&1 || { cat "$dir/mkfs.out" >&2; die "ceph-osd --mkfs failed"; }
start ceph-osd -i 0
until_ok "the OSD" sh -c 'timeout 10 ceph osd stat | grep -q "1 up"'
start radosgw -n client.admin --rgw-frontends "beast endpoint=127.0.0.1:$gw_port"
until_ok "the gateway" "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$gw_port', timeout=5)"
until_ok "the user" timeout 60 radosgw-admin user create --uid depot --display-name depot \
  --access-key depot-access --secret-key depot-secret

export DEPOT_TEST_RADOSGW="http://depot-access:depot-secret@127.0.0.1:$gw_port"
echo "radosgw $(radosgw --version | cut -d' ' -f3) at 127.0.0.1:$gw_port after ${SECONDS} s"
"$python" -m pytest -m radosgw tests/registry/storage "$@"

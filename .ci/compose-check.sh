#!/usr/bin/env bash
# docker-compose.yml is valid with its secrets set, and refuses to start without any one of them. Needs no engine.
set -euo pipefail
cd "$(dirname "$0")/.."

if docker compose version >/dev/null 2>&1; then compose=(docker compose)
elif command -v docker-compose >/dev/null; then compose=(docker-compose)
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends docker-compose >/dev/null
  compose=(docker-compose)
else
  echo "Install docker compose to check docker-compose.yml." >&2
  exit 1
fi

filled=$(mktemp)
trap 'rm -f "$filled" "$filled.less"' EXIT
sed -E 's/^([A-Z0-9_]+)=$/\1=0123456789abcdef0123456789abcdef/' .env.example >"$filled"
"${compose[@]}" --env-file "$filled" config --quiet

for name in $(sed -nE 's/^([A-Z0-9_]+)=$/\1/p' .env.example); do
  grep -v "^$name=" "$filled" >"$filled.less"
  if "${compose[@]}" --env-file "$filled.less" config --quiet 2>/dev/null; then
    echo "docker-compose.yml starts without $name" >&2
    exit 1
  fi
done
echo "docker-compose.yml is valid, and needs each of its secrets."

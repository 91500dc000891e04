#!/usr/bin/env bash
# Times whole commands of qtk's release build against other tools on the guest of tests/guest/build.sh, in interleaved
# rounds with a warm page cache, and prints medians and ratios as Markdown. peers.py lists the commands.
# usage: benches/peers.sh [ROUNDS]     (5 by default, which take about six minutes)
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
. tests/guest/disk.sh
rounds=${1:-5}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "usage: benches/peers.sh [ROUNDS]"

tests/oracles.sh
type -P time >/dev/null || fail "no time: install the package of that name"
cargo build --release --locked
PATH=${CARGO_TARGET_DIR:-$PWD/target}/release:$PATH
commit=$(git describe --always --dirty)
peers=$PWD/benches/peers.py
guest=$(tests/guest/build.sh)
work=$(mktemp -d "${TMPDIR:-/var/tmp}/qtk-peers-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
qtk compat install drop-in

# --- what the commands work on ---
ln -s "$guest/ubuntu.raw" ubuntu.raw
head -c 60M /dev/urandom >payload
root=$(partition ubuntu.raw 1 | cut -d' ' -f1)
debugfs_write() { debugfs -w -R "write $2 $3" "$1?offset=$root" >/dev/null 2>&1; }
# Layers of a chain: each is the difference between one state of the disk and the next.
cp --sparse=always ubuntu.raw state.raw
layer() { # NAME BACKING FORMAT, the state in state.raw
    qemu-img create -q -f qcow2 -b state.raw -F raw "$1"
    qemu-img rebase -b "$2" -F "$3" "$1"
}
qemu-img convert -O qcow2 ubuntu.raw plain.qcow2
cp "$guest/ubuntu.qcow2" packed.qcow2
debugfs_write state.raw payload /usr/local/bin/payload
layer plain-1.qcow2 plain.qcow2 qcow2
debugfs_write state.raw "$guest/vmlinuz" /usr/local/lib/vmlinuz
layer plain-2.qcow2 plain-1.qcow2 qcow2
cp plain-1.qcow2 packed-1.qcow2
cp plain-2.qcow2 packed-2.qcow2
qemu-img rebase -u -b packed.qcow2 -F qcow2 packed-1.qcow2
qemu-img rebase -u -b packed-1.qcow2 -F qcow2 packed-2.qcow2
rm state.raw
# A large disk of which every cluster has its place: 1.6 million of them, and only the tables take space.
qemu-img create -q -f qcow2 -o preallocation=metadata large.qcow2 100G

cat <<END
$(nproc) cores, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(uname -sr), load $(cut -d' ' -f1 /proc/loadavg) at the start.
$(qtk --version) ($commit); $(qemu-img --version | head -n 1); $(debugfs -V 2>&1 | head -n 1); $(cp --version | head -n 1).
END
python3 "$peers" "$rounds" "$root"

#!/usr/bin/env bash
# Times whole commands of qtk's release build against other tools on the guest of tests/guest/build.sh, in interleaved
# rounds with a warm page cache, and prints medians and ratios as Markdown.
# usage: benches/peers.sh [ROUNDS]     (5 by default)
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
. tests/guest/disk.sh
rounds=${1:-5}
[[ $rounds =~ ^[1-9][0-9]*$ ]] || fail "usage: benches/peers.sh [ROUNDS]"

tests/oracles.sh
type -P time >/dev/null || fail "no time: install the package of that name"
cargo build --release --locked
PATH=${CARGO_TARGET_DIR:-$PWD/target}/release:$PATH
guest=$(tests/guest/build.sh)
work=$(mktemp -d "${TMPDIR:-/var/tmp}/qtk-peers-XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
qtk compat install drop-in

# --- what the commands work on ---
head -c 60M /dev/urandom >payload
base=$guest/ubuntu.raw
root=$(partition "$base" 1 | cut -d' ' -f1)
debugfs_write() { debugfs -w -R "write $2 $3" "$1?offset=$root" >/dev/null 2>&1; }
# Layers of a chain: each is the difference between one state of the disk and the next.
cp --sparse=always "$base" state.raw
layer() { # NAME BACKING FORMAT, the state in state.raw
    qemu-img create -q -f qcow2 -b state.raw -F raw "$1"
    qemu-img rebase -b "$2" -F "$3" "$1"
}
qemu-img convert -O qcow2 "$base" plain.qcow2
cp "$guest/ubuntu.qcow2" packed.qcow2
debugfs_write state.raw payload /usr/local/bin/payload
layer plain-1.qcow2 plain.qcow2 qcow2
debugfs_write state.raw "$guest/vmlinuz" /usr/local/lib/vmlinuz
layer plain-2.qcow2 plain-1.qcow2 qcow2
cp plain-1.qcow2 packed-1.qcow2
cp plain-2.qcow2 packed-2.qcow2
qemu-img rebase -u -b packed.qcow2 -F qcow2 packed-1.qcow2
qemu-img rebase -u -b packed-1.qcow2 -F qcow2 packed-2.qcow2

# --- the commands: what they do, whose they are, the command, the output to measure, what to make before ---
results=$work/results
run() {
    local task=$1 tool=$2 command=$3 output=$4 before=${5:-:} start end
    rm -f "$output"
    eval "$before"
    sync
    start=$EPOCHREALTIME
    command time -o usage -f '%U %S %M' bash -c "exec $command" >/dev/null 2>messages ||
        fail "$command: $(cat messages)"
    end=$EPOCHREALTIME
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$task" "$tool" "$command" "$((${end/./} - ${start/./}))" "$(cat usage)" \
        "$(stat --format %s "$output" 2>/dev/null || echo 0)" >>"$results"
}

# The same command line under qemu-img's name, given to both.
both() {
    local task=$1 command=$2 output=${3-} before=${4:-:}
    run "$task" qtk "drop-in/qemu-img $command" "$output" "$before"
    run "$task" qemu-img "qemu-img $command" "$output" "$before"
}

round() {
    local codec source task
    for codec in zlib zstd; do
        for source in "$base" plain-2.qcow2 packed-2.qcow2; do
            case $source in
            packed*)
                [[ $codec == zlib ]] || continue
                task="flatten a chain on a compressed base, zlib"
                ;;
            plain*) task="flatten a chain of 3, $codec" ;;
            *) task="flatten a raw image, $codec" ;;
            esac
            run "$task" qtk "qtk flatten $source -o ours.qcow2 -c $codec" ours.qcow2
            run "$task" qemu-img \
                "qemu-img convert -c -m 16 -W -O qcow2 -o compression_type=$codec $source theirs.qcow2" theirs.qcow2
            qemu-img compare -q ours.qcow2 theirs.qcow2 || fail "$task: the outputs differ"
        done
    done
    both "convert raw to qcow2" "convert -O qcow2 $base new.qcow2" new.qcow2
    both "convert raw to compressed qcow2" "convert -c -O qcow2 $base new.qcow2" new.qcow2
    both "convert compressed qcow2 to raw" "convert -O raw packed.qcow2 new.raw" new.raw
    both "commit an overlay" "commit -q top.qcow2" '' \
        'cp plain.qcow2 below.qcow2; cp plain-1.qcow2 top.qcow2; qemu-img rebase -u -b below.qcow2 -F qcow2 top.qcow2'
    both "rebase onto the base's base" "rebase -b plain.qcow2 -F qcow2 top.qcow2" top.qcow2 'cp plain-2.qcow2 top.qcow2'
    both "take a snapshot" "snapshot -c one top.qcow2" '' 'cp plain.qcow2 top.qcow2'
    both "check" "check packed.qcow2"
    both "compare" "compare packed.qcow2 plain.qcow2"
    both "map" "map --output=json plain-2.qcow2"
    both "measure" "measure -O qcow2 plain-2.qcow2"
    both "info" "info --backing-chain plain-2.qcow2"
    both "create" "create -q -f qcow2 -b plain.qcow2 -F qcow2 new.qcow2" new.qcow2
    task="inject 60 MiB"
    run "$task" qtk "qtk inject edited.qcow2 payload /usr/local/bin/" '' 'cp packed.qcow2 edited.qcow2'
    run "$task" "debugfs, raw image" \
        "sh -c 'debugfs -w -R \"write payload /usr/local/bin/payload\" \"edited.raw?offset=$root\" && sync edited.raw'" \
        '' "cp --sparse=always '$base' edited.raw"
    run "$task" "cp and fsync" "sh -c 'cp payload copy && sync copy'" '' 'rm -f copy'
    run "list /usr/bin" qtk "qtk ls -l packed.qcow2 /usr/bin" ''
    run "list /usr/bin" "qemu-img and debugfs" \
        "sh -c 'qemu-img convert -O raw packed.qcow2 look.raw && debugfs -R \"ls -l /usr/bin\" \"look.raw?offset=$root\"'" ''
    run "show /etc/fstab" qtk "qtk cat packed.qcow2 /etc/fstab" ''
    run "show /etc/fstab" "qemu-img and debugfs" \
        "sh -c 'qemu-img convert -O raw packed.qcow2 look.raw && debugfs -R \"cat /etc/fstab\" \"look.raw?offset=$root\"'" ''
}
for ((i = 1; i <= rounds; i++)); do
    say "round $i of $rounds"
    round
done

# --- the table ---
commit=$(git -C "$OLDPWD" describe --always --dirty)
cat <<END
$(nproc) cores, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(uname -sr), load $(cut -d' ' -f1 /proc/loadavg) at the end.
$(qtk --version) ($commit); $(qemu-img --version | head -n 1); $(debugfs -V 2>&1 | head -n 1).
Medians of $rounds interleaved rounds, warm page cache. Time is that of the whole process; "ratio" is qtk's wall time to the peer's.
qtk's times include the fsync of what it wrote; qemu-img does none.

END
python3 - "$results" "$guest" <<'END'
import collections
import statistics
import sys

rows = collections.defaultdict(list)
commands = {}
for line in open(sys.argv[1]):
    task, tool, command, wall, usage, size = line.rstrip("\n").split("\t")
    user, system, peak = usage.split()
    rows[task, tool].append((int(wall) / 1e6, float(user) + float(system), int(peak) / 1024, int(size) / 1e6))
    commands[task, tool] = command.replace(sys.argv[2] + "/", "")
medians = {key: [statistics.median(column) for column in zip(*runs)] for key, runs in rows.items()}
print("| task | tool | wall s | ratio | CPU s | peak MiB | output MB | command |")
print("|---|---|--:|--:|--:|--:|--:|---|")
for (task, tool), (wall, cpu, peak, size) in medians.items():
    ratio = "" if tool == "qtk" else f"{medians[task, 'qtk'][0] / wall:.2f}"
    output = f"{size:.1f}" if size else ""
    print(f"| {task} | {tool} | {wall:.3f} | {ratio} | {cpu:.2f} | {peak:.0f} | {output} | `{commands[task, tool]}` |")
END

#!/usr/bin/env bash
# Judges that two images hold the same partitions and, but for the paths named, the same files: names, types, modes,
# owners, sizes, times, links, extended attributes and content. Exit 0 where they do; 1 with the differences printed.
# A path is that in its own file system, "16:/vmlinuz" in that of partition 16; 1 is the default, 0 a whole disk.
# What lies below an ignored path is ignored too, and so are the times, size and link count of its parent.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
. "$here/disk.sh"

usage='usage: compare.sh BEFORE AFTER [--ignore [PARTITION:]PATH]...'
before=${1:?$usage} after=${2:?$usage}
shift 2
ignored=()
while (($#)); do
    [[ $1 == --ignore && $# -ge 2 ]] || fail "$usage"
    ignored+=("$2")
    shift 2
done

work=$(mktemp -d)
mounted=
cleanup() {
    [[ -z $mounted ]] || umount "$mounted"
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

# Lists the files of the ext4 at bytes $2+$3 of $1; the rest are paths to leave out.
files() {
    local raw=$1 start=$2 size=$3
    shift 3
    if ((EUID == 0)); then
        mounted=$work/mount
        mkdir -p "$mounted"
        mount -t ext4 -o "ro,noload,loop,offset=$start,sizelimit=$size" "$raw" "$mounted"
        python3 "$here/manifest.py" mounted "$mounted" "$@"
        umount "$mounted"
        mounted=
    else
        python3 "$here/manifest.py" debugfs "$raw?offset=$start" "$@"
    fi
}

# Writes into folder $2 one file for each partition of image $1 that says all that must stay.
manifest() {
    local image=$1 out=$2 raw number start size path
    mkdir "$out"
    raw=$(as_raw "$image" "$work")
    volumes "$raw" >"$out/table"
    while read -r number start size; do
        if [[ $(fs_type "$raw" "$start" "$size") != ext4 ]]; then
            dd if="$raw" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$size" status=none |
                sha256sum >"$out/$number"
            continue
        fi
        local -a paths=()
        for path in "${ignored[@]}"; do
            [[ $path == *:/* ]] || path=1:$path
            [[ ${path%%:*} != "$number" ]] || paths+=("${path#*:}")
        done
        if dumpe2fs -h "$raw?offset=$start" 2>/dev/null | grep -Eq 'features:.*(needs_recovery|orphan_present)'; then
            # What a guest would see: the journal replayed, orphans gone.
            extract "$raw" "$start" "$size" "$work/partition"
            e2fsck -fy "$work/partition" >"$work/replay" 2>&1 || (($? == 1)) || fail "$image: $(cat "$work/replay")"
            files "$work/partition" 0 "$size" "${paths[@]}" >"$out/$number"
        else
            files "$raw" "$start" "$size" "${paths[@]}" >"$out/$number"
        fi
    done <"$out/table"
    [[ $raw != "$work"/* ]] || rm "$raw"
}

((EUID == 0)) || say "not root: files are read with debugfs instead of the kernel"
manifest "$before" "$work/before"
manifest "$after" "$work/after"
if ! diff -r -U0 "$work/before" "$work/after" >"$work/differences"; then
    head -n 200 "$work/differences"
    fail "$before and $after differ"
fi
say "$(cat "$work"/before/* | wc -l) lines agree: $before and $after hold the same"

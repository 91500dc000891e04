#!/usr/bin/env bash
# Checks an image and every file system in it; fails at the first that is not clean.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/disk.sh"

image=${1:?usage: fsck.sh IMAGE}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Runs a checker; shows what it said where it found something.
clean() {
    "$@" >"$work/output" 2>&1 || {
        cat "$work/output" >&2
        fail "$image: not clean: $*"
    }
}

[[ $(image_format "$image") == raw ]] || clean qemu-img check -U "$image"
raw=$(as_raw "$image" "$work")
checked=0
while read -r number start size; do
    case $(fs_type "$raw" "$start" "$size") in
    ext4) clean e2fsck -fn "$raw?offset=$start" ;;
    vfat)
        extract "$raw" "$start" "$size" "$work/esp"
        clean fsck.vfat -n "$work/esp"
        ;;
    *) continue ;;
    esac
    say "$image: partition $number is clean"
    checked=$((checked + 1))
done < <(volumes "$raw")
((checked)) || fail "$image: no file system to check"

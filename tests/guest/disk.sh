# shellcheck shell=bash
# Partitions of raw images for the scripts of this folder. Sourced.
PATH=$PATH:/usr/sbin:/sbin

say() { echo "${0##*/}: $*" >&2; }
fail() {
    say "$@"
    exit 1
}

# "NUMBER START SIZE" in bytes for each partition of a raw image.
partitions() {
    local number start sectors
    while read -r number start sectors; do
        echo "$number $((start * 512)) $((sectors * 512))"
    done < <(partx --raw --noheadings --output NR,START,SECTORS "$1")
}

# Start and size, in bytes, of partition $2 of raw image $1.
partition() {
    partitions "$1" | grep "^$2 " | cut -d' ' -f2-
}

# The same for what may hold a file system: its partitions or, as number 0, a disk without any.
volumes() {
    local found
    found=$(partitions "$1")
    echo "${found:-0 0 $(stat --format %s "$1")}"
}

# The file system type at byte range $2+$3 of $1; empty where there is none.
fs_type() { blkid --probe --offset "$2" --size "$3" --match-tag TYPE --output value "$1" || true; }

image_format() { qemu-img info -U --output=json "$1" | python3 -c 'import json, sys; print(json.load(sys.stdin)["format"])'; }

# Prints a raw image with the content of $1: itself, or a conversion in folder $2.
as_raw() {
    if [[ $(image_format "$1") == raw ]]; then
        realpath "$1"
    else
        local raw
        raw=$(mktemp "$2/XXXXXX.raw")
        qemu-img convert -U -O raw "$1" "$raw"
        echo "$raw"
    fi
}

# Copies byte range $2+$3 of $1 to the new file $4, with holes for zeros.
extract() {
    rm -f "$4"
    dd if="$1" of="$4" bs=1M iflag=skip_bytes,count_bytes skip="$2" count="$3" conv=sparse status=none
    truncate --size "$3" "$4"
}

#!/usr/bin/env bash
# Builds the guests of the tests from Debian packages and prints the folder that holds them:
#   ubuntu.qcow2, ubuntu.raw  Ubuntu's layout: root p1, BIOS p14, ESP p15, /boot p16; fstab by LABEL
#   debian.qcow2              Debian's layout: root p1 with /boot inside, BIOS p14, ESP p15; fstab by PARTUUID and UUID
#   ubuntu-dirty.qcow2, debian-dirty.qcow2
#                             overlays on these, as left by a machine that lost power: journal to replay, orphans
#   vmlinuz, initrd.img       the guests' kernel, for boot.sh
# The folder is made once per version of this script, under ${QTK_TEST_CACHE:-$XDG_CACHE_HOME/qtk-tests}.
#
# Without root and passwordless sudo, mmdebstrap needs user namespaces (newuidmap, a range in /etc/subuid, a cache
# folder that other users may enter) or fakechroot and fakeroot, and the dirty images get a journal written by
# debugfs, without orphans.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
. "$here/disk.sh"

export SOURCE_DATE_EPOCH=1735689600 E2FSPROGS_FAKE_TIME=1735689600 E2FSCK_TIME=1735689600 LC_ALL=C.UTF-8
ubuntu_features=none,has_journal,ext_attr,resize_inode,dir_index,orphan_file,filetype,extent,64bit,flex_bg
ubuntu_features+=,metadata_csum_seed,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum
# Debian 12 switched off what kernels before 5.15 cannot mount.
debian_features=${ubuntu_features/,orphan_file/}
debian_features=${debian_features/,metadata_csum_seed/}
esp_serial=5EEDC0DE
esp_uuid=5EED-C0DE

uuid() { printf '7e57da7a-%04x-4000-8000-%012x' "$1" "$2"; }

# --- inside mmdebstrap's hook: $1 is the installed root, $2 the folder for the images ---

# What a cloud image ships without.
seal() {
    rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/etc/ssh/ssh_host_* "$1"/var/log/apt \
        "$1"/var/log/dpkg.log "$1"/var/log/alternatives.log "$1"/etc/hostname "$1"/etc/resolv.conf
    mkdir -p "$1/var/cache/apt/archives/partial" "$1/var/lib/apt/lists/partial" "$1/boot/efi"
    : >"$1/etc/machine-id"
    echo guest >"$1/etc/hostname"
    chroot "$1" passwd --delete root >/dev/null
}

# Whatever an edit elsewhere must leave alone.
fixtures() {
    local dir="$1/srv/fixtures" i
    mkdir -p "$dir"/{many,deep/a/b/c/d/e/f/g/h}
    echo 'hard link' >"$dir/hard-a"
    ln "$dir/hard-a" "$dir/hard-b"
    ln "$dir/hard-a" "$dir/deep/a/hard-c"
    ln -s hard-a "$dir/fast-link"
    ln -s "/srv/fixtures/$(printf 'long-%.0s' {1..40})target" "$dir/slow-link"
    cp "$1/bin/true" "$dir/capable"
    setcap cap_net_raw,cap_net_bind_service+ep "$dir/capable"
    echo acl >"$dir/acl"
    setfacl -m u:1234:rw-,g:42:r-- "$dir/acl"
    setfacl -m d:u:1234:rwx "$dir/deep"
    echo xattr >"$dir/xattr"
    python3 -c '
import os, sys
os.setxattr(sys.argv[1], "user.small", b"\0binary\xff")
os.setxattr(sys.argv[1], "user.block", b"x" * 2000)' "$dir/xattr"
    truncate --size 64M "$dir/sparse"
    printf start | dd of="$dir/sparse" conv=notrunc status=none
    printf middle | dd of="$dir/sparse" conv=notrunc bs=1M seek=33 status=none
    : >"$dir/empty"
    touch "$dir/with space" "$dir/größe-日本" "$dir/$(printf 'n%.0s' {1..255})"
    mkfifo "$dir/fifo"
    for i in {1..1200}; do echo "$i" >"$dir/many/entry-with-a-rather-long-name-$i"; done
    chown 1234:5678 "$dir/empty"
    chmod 4755 "$dir/hard-a"
    chmod 1777 "$dir/deep"
}

# Makes an ext4 in partition $2 of image $1 from tree $6, with directories indexed as the kernel would have.
ext4() {
    local image=$1 number=$2 label=$3 features=$4 id=$5 tree=$6 start size rc=0
    read -r start size < <(partition "$image" "$number")
    mke2fs -q -F -t ext4 -b 4096 -I 256 -O "$features" -L "$label" -U "$id" \
        -E "offset=$start,hash_seed=$id" -d "$tree" "$image" "$((size / 1024))k"
    e2fsck -fyD "$image?offset=$start" >/dev/null 2>&1 || rc=$?
    ((rc <= 1)) || fail "e2fsck -D on partition $number of $image: exit $rc"
}

# Makes the ESP in partition 15 of image $1.
esp() {
    local start size part=$1.esp tree
    read -r start size < <(partition "$1" 15)
    tree=$(mktemp -d)
    mkdir -p "$tree/EFI/BOOT" "$tree/EFI/debian"
    printf 'search.fs_label cloudimg-rootfs root\n' >"$tree/EFI/debian/grub.cfg"
    head -c 200000 "$root"/boot/vmlinuz-* >"$tree/EFI/BOOT/BOOTX64.EFI"
    find "$tree" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
    truncate --size "$size" "$part"
    mkfs.vfat --invariant -i "$esp_serial" -n UEFI "$part" >/dev/null
    mcopy -m -s -i "$part" "$tree/EFI" ::
    dd if="$part" of="$1" bs=1M seek=$((start >> 20)) conv=notrunc,sparse status=none
    rm -r "$part" "$tree"
}

ubuntu() {
    local image=$1
    truncate --size 3584M "$image"
    sgdisk -n 14:0:+4M -t 14:EF02 -n 15:0:+106M -t 15:EF00 -n 16:0:+913M -t 16:EA00 -n 1:0:0 -t 1:8300 \
        -U "$(uuid 1 0)" -u "1:$(uuid 1 1)" -u "14:$(uuid 1 14)" -u "15:$(uuid 1 15)" -u "16:$(uuid 1 16)" \
        "$image" >/dev/null
    esp "$image"
    ext4 "$image" 16 BOOT "$ubuntu_features" "$(uuid 2 16)" "$root/boot"
    # /boot is a mount point here.
    mkdir "$work/boot"
    mv "$root"/boot/* "$work/boot"
    printf '%s\n' 'LABEL=cloudimg-rootfs / ext4 discard,commit=30,errors=remount-ro 0 1' \
        'LABEL=BOOT /boot ext4 defaults 0 2' 'LABEL=UEFI /boot/efi vfat umask=0077 0 1' >"$root/etc/fstab"
    ext4 "$image" 1 cloudimg-rootfs "$ubuntu_features" "$(uuid 2 1)" "$root"
    mv "$work"/boot/* "$root/boot"
    rmdir "$work/boot"
}

debian() {
    local image=$1
    truncate --size 3G "$image"
    sgdisk -n 14:0:+3M -t 14:EF02 -n 15:0:+124M -t 15:EF00 -n 1:0:0 -t 1:8304 \
        -U "$(uuid 3 0)" -u "1:$(uuid 3 1)" -u "14:$(uuid 3 14)" -u "15:$(uuid 3 15)" "$image" >/dev/null
    esp "$image"
    printf '%s\n' "PARTUUID=$(uuid 3 1) / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1" \
        "UUID=$esp_uuid /boot/efi vfat defaults 0 0" >"$root/etc/fstab"
    ext4 "$image" 1 '' "$debian_features" "$(uuid 4 1)" "$root"
}

assemble() {
    local work=$2 root=$2/root
    # mmdebstrap has /proc, /sys and more mounted inside: a plain bind mount shows the tree without them.
    mkdir "$root"
    mount --bind "$1" "$root" 2>/dev/null || root=$1
    seal "$root"
    fixtures "$root"
    find "$root" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    ubuntu "$work/ubuntu.raw"
    debian "$work/debian.raw"
}

# --- outside ---

# Leaves raw image $1 as a kernel leaves it that stops at once: committed transactions that never reached their
# place, revoked blocks, and files that were deleted while open.
crash_kernel() {
    local image=$1 mount=$1.mount start size fd
    read -r start size < <(partition "$image" 1)
    mkdir "$mount"
    mount -o "loop,offset=$start,sizelimit=$size,commit=300" "$image" "$mount"
    mkdir "$mount/srv/crash"
    for i in {1..400}; do echo "$i" >"$mount/srv/crash/$i"; done
    cp "$mount/bin/bash" "$mount/srv/crash/orphan"
    seq 100000 >"$mount/srv/crash/appended"
    sync --file-system "$mount"
    rm -r "$mount/srv/fixtures/many"
    rm "$mount"/srv/crash/?? "$mount/srv/fixtures/hard-b"
    mv "$mount/srv/crash/1" "$mount/srv/crash/renamed"
    seq 100000 >>"$mount/srv/crash/appended"
    exec {fd}<"$mount/srv/crash/orphan"
    rm "$mount/srv/crash/orphan"
    sync --file-system "$mount"
    cp --sparse=always "$image" "$image.crashed"
    exec {fd}<&-
    umount "$mount"
    rmdir "$mount"
    mv -f "$image.crashed" "$image"
}

# The same with debugfs: one committed transaction that holds a block of a file.
crash_debugfs() {
    local image=$1 start size block
    read -r start size < <(partition "$image" 1)
    block=$(debugfs -R 'bmap /etc/hostname 0' "$image?offset=$start" 2>/dev/null)
    { echo replayed; head -c 4087 /dev/zero; } >"$work/block"
    printf '%s\n' 'jo -c' "jw -b $block $work/block" jc | debugfs -w -f - "$image?offset=$start" >/dev/null 2>&1
}

crash() {
    local base=$1
    cp --sparse=always "$base.raw" "$base-dirty.raw"
    if ! $root || ! "${as_root[@]}" "$here/build.sh" --crash "$base-dirty.raw"; then
        say "cannot mount loop devices (needs root): ${base##*/}-dirty.qcow2 has a debugfs journal and no orphans"
        crash_debugfs "$base-dirty.raw"
    fi
    dumpe2fs -h "$base-dirty.raw?offset=$(partition "$base.raw" 1 | cut -d' ' -f1)" 2>/dev/null |
        grep -q 'features:.* needs_recovery' || fail "$base-dirty.raw: its journal is clean"
    # An overlay holds what differs once it is rebased; names stay relative, so that the folder can be renamed.
    (cd "$work" && qemu-img create -q -f qcow2 -b "$base-dirty.raw" -F raw "$base-dirty.qcow2" &&
        qemu-img rebase -b "${base##*/}.qcow2" -F qcow2 "$base-dirty.qcow2")
    rm "$base-dirty.raw"
}

# Debian's mirror that this machine uses; empty on others, for mmdebstrap's default.
mirror() {
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "bookworm" { print $2; exit }'
}

install() {
    local -a run=("${as_root[@]}" unshare --mount mmdebstrap --mode=root) mirror
    if ! $root; then
        run=(mmdebstrap --mode=auto)
        # A user namespace's root is another user, who writes the images.
        chmod 0777 "$work"
    fi
    mapfile -t mirror < <(mirror)
    "${run[@]}" --quiet --variant=minbase --dpkgopt=force-unsafe-io \
        --include=linux-image-cloud-amd64,systemd-sysv,udev,dbus,cloud-init,openssh-server \
        --customize-hook="'$here/build.sh' --assemble \"\$1\" '$work'" \
        bookworm /dev/null "${mirror[@]}" </dev/null >&2 {lock}>&-
}

build() {
    install
    say "installed and assembled after $SECONDS s"
    for image in ubuntu debian; do
        qemu-img convert -c -f raw -O qcow2 "$work/$image.raw" "$work/$image.qcow2" &
    done
    wait -n && wait -n
    say "compressed after $SECONDS s"
    local boot
    boot="$work/ubuntu.raw?offset=$(partition "$work/ubuntu.raw" 16 | cut -d' ' -f1)"
    for file in vmlinuz initrd.img; do
        name=$(debugfs -R 'ls -p /' "$boot" 2>/dev/null | cut -d/ -f6 | grep "^$file-")
        debugfs -R "dump /$name $work/$file" "$boot" 2>/dev/null
        [[ -s $work/$file ]] || fail "no $file in the guest's /boot"
    done
    crash "$work/ubuntu"
    crash "$work/debian"
    rm -rf "$work/debian.raw" "$work/root" "$work/block" "$work"/*.mount
    chmod 0755 "$work"
}

main() {
    local cache=${QTK_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qtk-tests} guest lock
    guest=$cache/guest-$(sha256sum <"$here/build.sh" | cut -c1-16)
    mkdir -p "$cache"
    exec {lock}>"$cache/lock"
    flock "$lock"
    if [[ ! -d $guest ]]; then
        work=$(mktemp -d "$cache/build-XXXXXX")
        trap 'rm -rf "$work"' EXIT
        as_root=() root=true
        if ((EUID != 0)); then
            as_root=(sudo -n)
            sudo -n true 2>/dev/null || root=false
        fi
        build
        mv "$work" "$guest"
        trap - EXIT
        say "built $guest in $SECONDS s"
    fi
    echo "$guest"
}

case ${1-} in
--assemble) assemble "$2" "$3" ;;
--crash) crash_kernel "$2" ;;
*) main ;;
esac

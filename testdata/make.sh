#!/usr/bin/env bash
# Makes demo-guest.qcow2: a guest in miniature with Ubuntu's layout (root p1, BIOS boot p14, ESP p15, /boot p16; fstab
# by LABEL) and Ubuntu 24.04's ext4 features, made by the same tools as the real one. All its files are written here:
# it has the shape of a Debian system and nothing that runs; its kernel and library are noise, which does not compress.
# The same tools give the same bytes: debugfs fills the file systems, since mke2fs -d follows the host's
# directory order. Needs qemu-utils, e2fsprogs 1.47, gdisk, dosfstools, mtools, python3; no root.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
out=$(dirname "$(realpath "$0")")/demo-guest.qcow2
[[ $# -eq 0 ]] || out=$(realpath "$1")

export SOURCE_DATE_EPOCH=1735689600 E2FSPROGS_FAKE_TIME=1735689600 E2FSCK_TIME=1735689600 LC_ALL=C.UTF-8 TZ=UTC
features=none,has_journal,ext_attr,resize_inode,dir_index,orphan_file,filetype,extent,64bit,flex_bg
features+=,metadata_csum_seed,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

uuid() { printf 'de300000-%04x-4000-8000-%012x' "$1" "$2"; }

# Each of these adds debugfs commands to $script for one file system; paths are absolute in it.
attributes() { # PATH MODE OWNER GROUP
    printf 'sif %s mode 0%o\nsif %s uid %s\nsif %s gid %s\n' "$1" "$2" "$1" "${3:-0}" "$1" "${4:-0}" >&3
    printf 'sif %s %s @%s\n' "$1" atime "$SOURCE_DATE_EPOCH" "$1" ctime "$SOURCE_DATE_EPOCH" \
        "$1" mtime "$SOURCE_DATE_EPOCH" "$1" crtime "$SOURCE_DATE_EPOCH" >&3
}
directory() { # PATH [PERMISSIONS [OWNER GROUP]]
    echo "mkdir $1" >&3
    attributes "$1" $((040000 | 0${2:-755})) "${@:3}"
}
file() { # PATH [PERMISSIONS [OWNER GROUP]], content on stdin
    local source
    source=$(mktemp --tmpdir="$work" content-XXXXXX)
    cat >"$source"
    printf 'write %s %s\n' "$source" "$1" >&3
    attributes "$1" $((0100000 | 0${2:-644})) "${@:3}"
}
symlink() { # PATH TARGET
    echo "symlink $1 $2" >&3
    attributes "$1" $((0120777))
}
# Bytes that do not compress, the same everywhere.
noise() { # BYTES SEED
    python3 -c '
import hashlib, sys
size, seed = int(sys.argv[1]), sys.argv[2]
blocks = (hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(size // 32))
sys.stdout.buffer.write(b"".join(blocks))' "$@"
}

root_files() {
    local path name i
    for path in usr usr/bin usr/sbin usr/lib usr/lib64; do directory "/$path"; done
    for name in bin sbin lib lib64; do symlink "/$name" "usr/$name"; done
    for path in boot boot/efi dev etc etc/default etc/ssh etc/cloud etc/cloud/cloud.cfg.d home media mnt opt proc run srv sys \
        etc/systemd etc/systemd/system etc/systemd/system/multi-user.target.wants usr/lib/systemd usr/lib/systemd/system \
        usr/lib/x86_64-linux-gnu usr/local usr/local/bin usr/share usr/share/doc \
        var var/cache var/lib var/lib/cloud var/lib/dpkg var/lib/dpkg/info var/lib/systemd var/log; do
        directory "/$path"
    done
    directory /root 700
    directory /tmp 1777
    directory /var/tmp 1777
    directory /home/ubuntu 750 1000 1000
    symlink /var/run /run
    symlink /var/lock /run/lock

    printf '%s\n' 'LABEL=cloudimg-rootfs / ext4 discard,commit=30,errors=remount-ro 0 1' \
        'LABEL=BOOT /boot ext4 defaults 0 2' 'LABEL=UEFI /boot/efi vfat umask=0077 0 1' | file /etc/fstab
    printf '%s\n' 'PRETTY_NAME="qtk demo guest"' 'NAME="qtk demo guest"' ID=qtk-demo 'ID_LIKE=debian' 'VERSION_ID="1"' |
        file /usr/lib/os-release
    symlink /etc/os-release ../usr/lib/os-release
    printf '%s\n' root:x:0:0:root:/root:/bin/bash daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin \
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin ubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash |
        file /etc/passwd
    printf '%s\n' root:x:0: daemon:x:1: sudo:x:27:ubuntu www-data:x:33: shadow:x:42: ubuntu:x:1000: | file /etc/group
    printf '%s\n' 'root:*:20089:0:99999:7:::' 'daemon:*:20089:0:99999:7:::' 'www-data:*:20089:0:99999:7:::' \
        'ubuntu:!:20089:0:99999:7:::' | file /etc/shadow 640 0 42
    echo demo | file /etc/hostname
    printf '127.0.0.1 localhost\n127.0.1.1 demo\n' | file /etc/hosts
    file /etc/machine-id 444 </dev/null
    printf 'PermitRootLogin prohibit-password\n' | file /etc/ssh/sshd_config
    printf 'datasource_list: [ NoCloud, None ]\n' | file /etc/cloud/cloud.cfg.d/90_dpkg.cfg
    symlink /etc/localtime /usr/share/zoneinfo/Etc/UTC

    for name in basic sysinit network network-online multi-user graphical; do
        printf '[Unit]\nDescription=%s\n' "$name" | file "/usr/lib/systemd/system/$name.target"
    done
    symlink /etc/systemd/system/default.target /usr/lib/systemd/system/multi-user.target
    for name in ssh cron cloud-init; do
        printf '[Unit]\nDescription=%s\nAfter=network.target\n[Service]\nExecStart=/usr/sbin/%s\n[Install]\nWantedBy=multi-user.target\n' \
            "$name" "$name" | file "/usr/lib/systemd/system/$name.service"
        symlink "/etc/systemd/system/multi-user.target.wants/$name.service" "/usr/lib/systemd/system/$name.service"
    done

    for name in sh cat ls cp mv ln rm mkdir chmod chown; do
        printf '#!/bin/sh\n# %s of the demo guest\nexit 0\n' "$name" | file "/usr/bin/$name" 755
    done
    for name in ssh cron cloud-init nologin; do
        printf '#!/bin/sh\nexit 0\n' | file "/usr/sbin/$name" 755
    done
    printf '#!/bin/sh\nexit 0\n' | file /usr/bin/sudo 4755
    noise 16384 library | file /usr/lib/x86_64-linux-gnu/libdemo.so.1.0
    symlink /usr/lib/x86_64-linux-gnu/libdemo.so.1 libdemo.so.1.0
    # Too long for the inode.
    symlink /usr/share/doc/changelog "/usr/share/doc/$(printf 'a-long-name-%.0s' {1..8})/changelog"

    # A directory of several blocks, indexed below.
    for i in {001..320}; do
        printf '/.\n/usr\n/usr/share/doc/package-%s\n' "$i" | file "/var/lib/dpkg/info/package-with-a-long-name-$i:amd64.list"
    done
    printf 'ext4\n' | file /var/lib/dpkg/hard-link
    printf 'ln %s %s\nsif %s links_count 2\n' /var/lib/dpkg/hard-link /var/lib/dpkg/hard-link-2 /var/lib/dpkg/hard-link >&3
    printf 'ea_set %s user.origin demo\n' /etc/hostname >&3
    # cap_net_raw=ep
    printf 'ea_set -f %s %s security.capability\n' "$work/capability" /usr/bin/cat >&3
    attributes /lost+found $((040700))
    attributes / $((040755))
}

boot_files() {
    directory /grub
    directory /efi 700
    noise 16384 kernel | file /vmlinuz-6.8.0-demo 600
    noise 8192 initrd | file /initrd.img-6.8.0-demo
    symlink /vmlinuz vmlinuz-6.8.0-demo
    symlink /initrd.img initrd.img-6.8.0-demo
    printf 'menuentry demo {\n  linux /vmlinuz-6.8.0-demo root=LABEL=cloudimg-rootfs ro console=ttyS0\n  initrd /initrd.img-6.8.0-demo\n}\n' |
        file /grub/grub.cfg
    attributes /lost+found $((040700))
    attributes / $((040755))
}

# Makes ext4 image $1 of $2 MiB, filled by function $5.
ext4() {
    local rc=0
    truncate --size "$2M" "$1"
    mke2fs -q -t ext4 -b 4096 -I 256 -O "$features" -L "$3" -U "$4" -E "hash_seed=$4" "$1"
    "$5" 3>commands
    debugfs -w -f commands "$1" 2>&1 >/dev/null | grep -v '^debugfs 1' >errors || true
    [[ ! -s errors ]] || { cat errors >&2 && exit 1; }
    # Indexes the large directories.
    e2fsck -fyD "$1" >checked 2>&1 || rc=$?
    ((rc <= 1)) || { cat checked >&2 && exit 1; }
    e2fsck -fn "$1" >checked 2>&1 || { cat checked >&2 && exit 1; }
}

printf '\1\0\0\2\0\40\0\0\0\0\0\0\0\0\0\0\0\0\0\0' >capability
truncate --size 256M disk
sgdisk -n 14:0:+4M -t 14:EF02 -n 15:0:+16M -t 15:EF00 -n 16:0:+32M -t 16:EA00 -n 1:0:+202M -t 1:8300 \
    -U "$(uuid 1 0)" -u "1:$(uuid 1 1)" -u "14:$(uuid 1 14)" -u "15:$(uuid 1 15)" -u "16:$(uuid 1 16)" disk >/dev/null
ext4 root 202 cloudimg-rootfs "$(uuid 2 1)" root_files
ext4 boot 32 BOOT "$(uuid 2 16)" boot_files
truncate --size 16M esp
mkfs.vfat --invariant -i DE300001 -n UEFI esp >/dev/null
mkdir -p EFI/BOOT EFI/ubuntu
noise 4096 loader >EFI/BOOT/BOOTX64.EFI
printf 'search.fs_label BOOT root\n' >EFI/ubuntu/grub.cfg
find EFI -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
mmd -i esp ::EFI ::EFI/BOOT ::EFI/ubuntu
mcopy -m -i esp EFI/BOOT/BOOTX64.EFI ::EFI/BOOT
mcopy -m -i esp EFI/ubuntu/grub.cfg ::EFI/ubuntu
# In MiB, as sgdisk aligned them.
dd if=esp of=disk bs=1M seek=5 conv=notrunc,sparse status=none
dd if=boot of=disk bs=1M seek=21 conv=notrunc,sparse status=none
dd if=root of=disk bs=1M seek=53 conv=notrunc,sparse status=none
sgdisk --verify disk | grep -q 'No problems found'
qemu-img convert -c -f raw -O qcow2 disk "$out"

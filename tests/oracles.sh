#!/usr/bin/env bash
# Installs the tools the tests judge by, where any is missing. Does nothing where all are there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# command:package, grouped by what the tests ask of them.
oracles=(
    qemu-img:qemu-utils qemu-io:qemu-utils qemu-system-x86_64:qemu-system-x86
    mke2fs:e2fsprogs e2fsck:e2fsprogs debugfs:e2fsprogs
    sgdisk:gdisk sfdisk:fdisk mkfs.vfat:dosfstools fsck.vfat:dosfstools mcopy:mtools
    mmdebstrap:mmdebstrap systemctl:systemd setcap:libcap2-bin setfacl:acl
    python3:python3 flock:util-linux cc:gcc
)
missing=()
for oracle in "${oracles[@]}"; do
    command -v "${oracle%%:*}" >/dev/null || missing+=("${oracle#*:}")
done
# mmdebstrap verifies Debian's archive with it, on Ubuntu too.
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -e $keyring ]] || missing+=(debian-archive-keyring)
((${#missing[@]})) || exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

refuse() {
    echo "oracles.sh: $1; install these packages yourself: ${missing[*]}" >&2
    exit 1
}
command -v apt-get >/dev/null || refuse "the tests need tools that are missing and this machine has no apt-get"
as_root=()
if ((EUID != 0)); then
    sudo -n true 2>/dev/null ||
        refuse "the tests need tools that are missing, and installing them needs root or passwordless sudo"
    as_root=(sudo)
fi
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@" >&2 </dev/null
}
install() { apt install -y --no-install-recommends "$@"; }

# Debian 12's own QEMU is 7.2; the tests compare with the output of 10, which is in its backports.
# The suite is taken from the mirror this machine already uses.
enable_backports() {
    local suite=$1 mirror
    apt-get indextargets --format '$(RELEASE)' 'Created-By: Packages' | grep -qx "$suite" && return
    mirror=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v release="${suite%-backports}" '$1 == release { print $2; exit }')
    [[ -n $mirror ]] || return
    echo "deb [signed-by=$keyring] $mirror $suite main" |
        "${as_root[@]}" tee "/etc/apt/sources.list.d/$suite.list" >/dev/null
    apt update
}

echo "installing ${missing[*]}" >&2
apt update || refuse "apt-get update failed"
qemu=() others=()
for package in "${missing[@]}"; do
    if [[ $package == qemu-* ]]; then qemu+=("$package"); else others+=("$package"); fi
done
((${#others[@]} == 0)) || install "${others[@]}" || refuse "apt-get install failed"
if ((${#qemu[@]})); then
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    { [[ $codename == bookworm ]] && enable_backports bookworm-backports &&
        install -t bookworm-backports "${qemu[@]}"; } ||
        install "${qemu[@]}" || refuse "apt-get install failed"
fi

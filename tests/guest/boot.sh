#!/usr/bin/env bash
# Boots the root partition of an image with its kernel in QEMU, on a throw-away overlay, and shows its serial console.
# Exit 0 once the console shows --until's text or, without it, when the guest powers off; 1 on a panic, on the
# guest's end before that text, or after --timeout seconds.
set -euo pipefail
. "$(dirname "$(realpath "$0")")/disk.sh"

usage="usage: boot.sh IMAGE [--until TEXT] [--timeout SECONDS] [--kernel FILE] [--initrd FILE] [--root-arg ARG]
               [--append ARGS] [--log FILE]
QTK_TEST_ACCEL=kvm|tcg picks the accelerator; by default KVM is used only where a guest kernel speaks on it."
until='' timeout=300 kernel='' initrd='' root_arg=root=LABEL=cloudimg-rootfs append='' log=''
image=${1:?$usage}
shift
while (($#)); do
    [[ $1 == --* && $# -ge 2 ]] || fail "$usage"
    case $1 in
    --until) until=$2 ;; --timeout) timeout=$2 ;; --kernel) kernel=$2 ;; --initrd) initrd=$2 ;;
    --root-arg) root_arg=$2 ;; --append) append=$2 ;; --log) log=$2 ;;
    *) fail "$usage" ;;
    esac
    shift 2
done
guest=$(dirname "$(realpath "$image")")
kernel=${kernel:-$guest/vmlinuz} initrd=${initrd:-$guest/initrd.img}
[[ -r $kernel && -r $initrd ]] || fail "no $kernel and $initrd: name the guest's kernel with --kernel and --initrd"

# Nothing here may wait: no network, no cloud-init, no first-boot keys; /boot and the ESP are not needed.
append="$root_arg rw console=ttyS0 panic=-1 net.ifnames=0 cloud-init=disabled systemd.show_status=1 \
systemd.firstboot=off fsck.mode=skip systemd.mask=boot.mount systemd.mask=boot-efi.mount systemd.mask=ssh.service \
systemd.mask=apt-daily.timer systemd.mask=apt-daily-upgrade.timer $append"

work=$(mktemp -d)
qemu=
cleanup() {
    [[ -z $qemu ]] || { kill "$qemu" && wait "$qemu"; } 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
log=${log:-$work/console}

# Starts QEMU with accelerator $1, its console in $2.
start() {
    local cpu=max
    [[ $1 == tcg ]] || cpu=host
    : >"$2"
    qemu-system-x86_64 -accel "$1" -cpu "$cpu" -smp 2 -m 1G -nodefaults -no-user-config -no-reboot -display none -monitor none \
        -kernel "$kernel" -initrd "$initrd" -append "$append" -serial "file:$2" -device virtio-rng-pci \
        -drive "file=$image,format=$(image_format "$image"),if=none,id=root,snapshot=on,cache=unsafe" \
        -device virtio-blk-pci,drive=root >"$work/qemu" 2>&1 &
    qemu=$!
}

# A KVM that opens may still not run a real guest: believe it once the guest's userspace has spoken.
kvm_works() {
    [[ -w /dev/kvm ]] || return 1
    start kvm "$work/probe"
    local works=1
    for ((i = 0; i < 80; i++)); do
        if grep -q 'Run /init as init process' "$work/probe"; then
            works=0
            break
        fi
        kill -0 "$qemu" 2>/dev/null || break
        sleep 0.1
    done
    kill "$qemu" 2>/dev/null || true
    wait "$qemu" || true
    qemu=
    return $works
}

accel=${QTK_TEST_ACCEL:-}
if [[ -z $accel ]]; then
    if kvm_works; then accel=kvm; else accel=tcg; fi
fi
start "$accel" "$log"
say "booting $image with $accel"
SECONDS=0
if [[ $log == "$work/console" ]]; then
    tail --pid "$qemu" --sleep-interval 0.2 --follow "$log" &
fi

verdict() {
    if [[ -n $until ]] && grep -qaF -- "$until" "$log"; then
        say "\"$until\" after $SECONDS s"
        exit 0
    fi
    ! grep -qa 'Kernel panic' "$log" || fail "the guest's kernel panicked after $SECONDS s"
}
while kill -0 "$qemu" 2>/dev/null; do
    verdict
    ((SECONDS < timeout)) || fail "${until:+no \"$until\", }still running after $timeout s"
    sleep 0.2
done
verdict
rc=0
wait "$qemu" || rc=$?
qemu=
((rc == 0)) || fail "QEMU: exit $rc: $(cat "$work/qemu")"
[[ -z $until ]] || fail "the guest stopped after $SECONDS s without \"$until\""
say "the guest stopped after $SECONDS s"

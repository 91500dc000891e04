#!/usr/bin/env bash
# Checks everything: formatting, lints, documentation, then every test against the real tools and real guests.
# usage: tests/run.sh [--no-lint] [TEST FILTER AND OTHER ARGUMENTS OF cargo test]...
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
# The tools live here; Debian's users do not have them in their path.
export PATH=$PATH:/usr/sbin:/sbin

lint=true
if [[ ${1-} == --no-lint ]]; then
    lint=false
    shift
fi

# Codecs without C.
pure_rust=(--no-default-features --features pure-rust)

tests/oracles.sh
if $lint; then
    cargo fmt --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    cargo clippy -p qtk -p qtk-guest -p qtk-image -p qtk-qcow2 "${pure_rust[@]}" --all-targets --locked -- -D warnings
    RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --no-deps --locked
fi
QTK_TEST_GUEST=$(tests/guest/build.sh)
export QTK_TEST_GUEST
# CI tries the same cases each time, so that a failure is the change's; elsewhere each run tries others.
[[ -z ${CI-} ]] || export PROPTEST_RNG_SEED=${PROPTEST_RNG_SEED-3}
cargo test --workspace --locked "$@"
if [[ $# == 0 ]]; then
    # With a filter of the caller's own, once is enough.
    cargo test -p qtk-qcow2 "${pure_rust[@]}" --locked --lib --test writer --test read
    cargo test -p qtk-image "${pure_rust[@]}" --locked --test image flatten
fi

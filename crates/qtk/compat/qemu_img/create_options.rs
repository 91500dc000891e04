//! The options that new images can have, as `-o help` lists them and `create` prints them.

use super::keyval::{Kind, Parameter};

const fn parameter(name: &'static str, kind: Kind, help: &'static str) -> Parameter {
    Parameter { name, kind, help, default: None }
}

const SIZE: Parameter = parameter("size", Kind::Size, "Virtual disk size");

/// Of the format raw.
pub(crate) const RAW: &[Parameter] = &[SIZE];

/// Of the format qcow2, in the order in which QEMU prints them.
pub(crate) const QCOW2: &[Parameter] = &[
    parameter(
        "encryption",
        Kind::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    parameter("encrypt.format", Kind::Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    parameter("encrypt.key-secret", Kind::Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    parameter("encrypt.cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    parameter("encrypt.cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    parameter("encrypt.ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    parameter("encrypt.ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    parameter("encrypt.hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    parameter("encrypt.iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    Parameter { default: Some("65536"), ..parameter("cluster_size", Kind::Size, "qcow2 cluster size") },
    Parameter { default: Some("off"), ..parameter("extended_l2", Kind::Bool, "Extended L2 tables") },
    parameter("preallocation", Kind::Text, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    Parameter {
        default: Some("zlib"),
        ..parameter("compression_type", Kind::Text, "Compression method used for image cluster compression")
    },
    SIZE,
    parameter("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    parameter("backing_file", Kind::Text, "File name of a base image"),
    parameter("backing_fmt", Kind::Text, "Image format of the base image"),
    parameter("data_file", Kind::Text, "File name of an external data file"),
    parameter("data_file_raw", Kind::Bool, "The external data file must stay valid as a raw image"),
    Parameter { default: Some("off"), ..parameter("lazy_refcounts", Kind::Bool, "Postpone refcount updates") },
    Parameter {
        default: Some("16"),
        ..parameter("refcount_bits", Kind::Number, "Width of a reference count entry in bits")
    },
];

/// Of the files that images are.
pub(crate) const FILE: &[Parameter] = &[
    SIZE,
    parameter("nocow", Kind::Bool, "Turn off copy-on-write (valid only on btrfs)"),
    parameter("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    parameter("extent_size_hint", Kind::Size, "Extent size hint for the image file, 0 to disable"),
];

/// The options of a format together with those of the file it is put in, those of the format first.
pub(crate) fn with_file(format: &'static [Parameter]) -> Vec<Parameter> {
    let is_new = |of_file: &&Parameter| format.iter().all(|of_format| of_format.name != of_file.name);
    format.iter().chain(FILE.iter().filter(is_new)).copied().collect()
}

/// What can be amended of a qcow2 image.
pub(crate) const AMEND_QCOW2: &[Parameter] = &[
    parameter("encrypt.state", Kind::Text, "Select new state of affected keyslots (active/inactive)"),
    parameter("encrypt.keyslot", Kind::Number, "Select a single keyslot to modify explicitly"),
    parameter("encrypt.old-secret", Kind::Text, "Select all keyslots that match this password"),
    parameter("encrypt.new-secret", Kind::Text, "New secret to set in the matching keyslots. Empty string to erase"),
    parameter("encrypt.iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds"),
    SIZE,
    parameter("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    parameter("backing_file", Kind::Text, "File name of a base image"),
    parameter("backing_fmt", Kind::Text, "Image format of the base image"),
    parameter("data_file", Kind::Text, "File name of an external data file"),
    parameter("data_file_raw", Kind::Bool, "The external data file must stay valid as a raw image"),
    parameter("lazy_refcounts", Kind::Bool, "Postpone refcount updates"),
    parameter("refcount_bits", Kind::Number, "Width of a reference count entry in bits"),
];

//! From the options of `-o` to a new qcow2 image, with QEMU's objections, in the order in which it raises them.

use qtk_qcow2::{Backing, ClusterBits, CompressionType, CreateOptions, Preallocation, Version};

use super::keyval::Values;
use super::message::Failure;

/// The drivers that a header can name, though none but raw and qcow2 can be read.
const DRIVERS: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "rbd",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

/// Whether a header can name that driver.
pub(crate) fn is_driver(name: &str) -> bool {
    DRIVERS.contains(&name)
}

/// Clusters must be at least as large as this to be divided.
const MIN_EXTENDED_CLUSTER: u64 = 16384;

/// What QEMU checks before it even makes the file.
pub(crate) fn check_encryption_aliases(values: &Values) -> Result<(), Failure> {
    if values.is_set("encryption") && values.is_set("encrypt.format") {
        return Err(Failure::new("'encrypt.format' and its alias 'encryption' can't be used at the same time"));
    }
    Ok(())
}

/// The image that `values` describe, of `size` bytes.
pub(crate) fn options(values: &Values, size: u64) -> Result<CreateOptions, Failure> {
    let version = version(values)?;
    let backing = backing(values)?;
    let encrypted = encrypted(values)?;
    let preallocation = preallocation("preallocation", values.text("preallocation").unwrap_or("off"))?;
    let refcount_bits = refcount_bits(values)?;
    let compression = compression(values)?;
    let options = CreateOptions {
        size,
        cluster_bits: cluster_bits(values, version)?,
        version,
        refcount_bits: u32::try_from(refcount_bits).unwrap_or(u32::MAX),
        compression,
        backing,
        lazy_refcounts: values.boolean("lazy_refcounts").unwrap_or(false),
        extended_l2: values.boolean("extended_l2").unwrap_or(false),
        data_file: values.text("data_file").map(str::to_owned),
        data_file_raw: values.boolean("data_file_raw").unwrap_or(false),
        preallocation,
    };
    check(&options, values.is_set("backing_fmt"))?;
    if encrypted {
        return Err(Failure::new("Encrypted images cannot be made"));
    }
    Ok(options)
}

fn not_accepted(parameter: &str, value: &str) -> Failure {
    Failure::new(format!("Parameter '{parameter}' does not accept value '{value}'"))
}

fn version(values: &Values) -> Result<Version, Failure> {
    match values.text("compat") {
        None | Some("1.1" | "v3") => Ok(Version::V3),
        Some("0.10" | "v2") => Ok(Version::V2),
        Some(other) => Err(not_accepted("version", other)),
    }
}

fn backing(values: &Values) -> Result<Option<Backing>, Failure> {
    let format = values.text("backing_fmt");
    if let Some(format) = format.filter(|format| !is_driver(format)) {
        return Err(not_accepted("backing-fmt", format));
    }
    let backing = |name: &str| Backing { name: name.to_owned(), format: format.map(str::to_owned) };
    Ok(values.text("backing_file").map(backing))
}

/// Whether an encrypted image is asked for.
fn encrypted(values: &Values) -> Result<bool, Failure> {
    let format = match values.boolean("encryption") {
        Some(true) => Some("aes"),
        _ => values.text("encrypt.format"),
    };
    match format {
        Some("aes" | "luks") if !values.is_set("encrypt.key-secret") => {
            Err(Failure::new("Parameter 'encrypt.key-secret' is required for cipher"))
        }
        Some("aes" | "luks") => Ok(true),
        Some(other) => Err(not_accepted("format", other)),
        None if values.names().any(|name| name.starts_with("encrypt.")) => {
            Err(Failure::new("Parameter 'encrypt.format' is missing"))
        }
        None => Ok(false),
    }
}

/// A preallocation mode; errors call it `parameter`.
fn preallocation(parameter: &str, name: &str) -> Result<Preallocation, Failure> {
    preallocation_mode(name).ok_or_else(|| not_accepted(parameter, name))
}

/// The preallocation mode of that name.
pub(crate) fn preallocation_mode(name: &str) -> Option<Preallocation> {
    match name {
        "off" => Some(Preallocation::Off),
        "metadata" => Some(Preallocation::Metadata),
        "falloc" => Some(Preallocation::Falloc),
        "full" => Some(Preallocation::Full),
        _ => None,
    }
}

fn refcount_bits(values: &Values) -> Result<u64, Failure> {
    let bits = values.number("refcount_bits").unwrap_or(16);
    // QEMU reads the number twice, and the second time negative ones are written as such.
    match values.text("refcount_bits").is_some_and(|text| text.trim_start().starts_with('-')) || bits < 1 << 63 {
        true => Ok(bits),
        false => Err(Failure::new("Parameter 'refcount-bits' expects integer")),
    }
}

fn compression(values: &Values) -> Result<CompressionType, Failure> {
    let name = values.text("compression_type").unwrap_or_default();
    let known = [CompressionType::Zlib, CompressionType::Zstd];
    known.into_iter().find(|known| known.name() == name).ok_or_else(|| not_accepted("compression-type", name))
}

/// The cluster size, with an eye on whether clusters are divided.
pub(crate) fn cluster_bits(values: &Values, version: Version) -> Result<ClusterBits, Failure> {
    let extended = values.boolean("extended_l2").unwrap_or(false);
    if extended && version < Version::V3 {
        return Err(needs_v3("Extended L2 entries are only supported"));
    }
    let bits = match values.number("cluster_size") {
        None => ClusterBits::default(),
        Some(size) => ClusterBits::from_size(size)
            .ok_or_else(|| Failure::new("Cluster size must be a power of two between 512 and 2048k"))?,
    };
    if extended && bits.size() < MIN_EXTENDED_CLUSTER {
        return Err(Failure::new(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED_CLUSTER} bytes"
        )));
    }
    Ok(bits)
}

fn needs_v3(feature: &str) -> Failure {
    Failure::new(format!("{feature} with compatibility level 1.1 and above (use version=v3 or greater)"))
}

/// A width that there is, in a version that has it; errors say how to ask for such a version.
pub(crate) fn check_refcount_bits(options: &CreateOptions, with: &str) -> Result<(), Failure> {
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return Err(Failure::new("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if options.version < Version::V3 && options.refcount_bits != 16 {
        let problem = "Different refcount widths than 16 bits require compatibility level 1.1 or above";
        return Err(Failure::new(format!("{problem} (use {with} or greater)")));
    }
    Ok(())
}

/// What does not go together.
fn check(options: &CreateOptions, has_backing_format: bool) -> Result<(), Failure> {
    let v2 = options.version < Version::V3;
    if options.backing.is_some() && options.preallocation != Preallocation::Off && !options.extended_l2 {
        return Err(Failure::new(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ));
    }
    if options.backing.is_none() && has_backing_format {
        return Err(Failure::new("Backing format cannot be used without backing file"));
    }
    if v2 && options.lazy_refcounts {
        return Err(needs_v3("Lazy refcounts only supported"));
    }
    check_refcount_bits(options, "version=v3")?;
    if options.data_file_raw && options.backing.is_some() {
        return Err(Failure::new("Backing file and data-file-raw cannot be used at the same time"));
    }
    if v2 && options.data_file.is_some() {
        return Err(needs_v3("External data files are only supported"));
    }
    if options.data_file_raw && options.data_file.is_none() {
        return Err(Failure::new("data-file-raw requires data-file"));
    }
    if v2 && options.compression != CompressionType::Zlib {
        return Err(needs_v3("Non-zlib compression type is only supported"));
    }
    Ok(())
}

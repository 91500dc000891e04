use std::collections::BTreeMap;
use std::fmt;

/// The value of a node's option. On a command line all are text; in `json:` they have types.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    /// A string, which may stand for a number or `on`/`off`.
    Text(String),
    /// A number, as it was written.
    Number(String),
    /// True or false.
    Bool(bool),
    /// `null`, which for `backing` means none.
    Null,
}

impl OptionValue {
    /// The value as text, if it is a string.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Number(text) => f.write_str(text),
            Self::Bool(true) => f.write_str("on"),
            Self::Bool(false) => f.write_str("off"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// Why a description of a node stands for none. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Text after `json:` that is no JSON.
    #[error("Could not parse the JSON options: {0}")]
    Json(String),
    /// JSON after `json:` that is no object.
    #[error("Invalid JSON object given")]
    NotAnObject,
    /// A driver that is not known, or not handled here.
    #[error("Unknown driver '{0}'")]
    UnknownDriver(String),
    /// Neither a driver nor a file.
    #[error("Must specify either driver or file")]
    NoDriver,
    /// A format without the node that holds its data.
    #[error("A block device must be specified for \"{0}\"")]
    NoChild(&'static str),
    /// The file driver without a name.
    #[error("The '{0}' block driver requires a file name")]
    NoFilename(String),
    /// A node that is referred to, though no node has a name yet.
    #[error("Cannot find device='{0}' nor node-name='{0}'")]
    UnknownNode(String),
    /// A node that is referred to and described as well.
    #[error("Cannot reference an existing block device with additional options or a new filename")]
    ReferenceWithOptions,
    /// An option that the driver does not have.
    #[error("Block format '{driver}' does not support the option '{option}'")]
    FormatOption {
        /// The driver.
        driver: String,
        /// The option.
        option: String,
    },
    /// An option that the driver of a file does not have.
    #[error("Block protocol '{driver}' doesn't support the option '{option}'")]
    ProtocolOption {
        /// The driver.
        driver: String,
        /// The option.
        option: String,
    },
    /// Neither `on` nor `off`.
    #[error("Parameter '{0}' expects 'on' or 'off'")]
    NotBool(String),
    /// Not a size.
    #[error(
        "Parameter '{0}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, \
         giga-, tera-, peta-\nand exabytes, respectively."
    )]
    NotSize(String),
    /// A negative size, or one of more than 64 bits.
    #[error("Value '{value}' is out of range for parameter '{option}'")]
    OutOfRange {
        /// The option.
        option: String,
        /// Its value.
        value: String,
    },
    /// A value that is none of those that an option can have.
    #[error("invalid parameter value: {0}")]
    InvalidValue(String),
    /// A set of overlap checks that does not exist.
    #[error(
        "Unsupported value '{0}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
    )]
    OverlapCheck(String),
    /// One of QEMU's caches larger than all of them.
    #[error("{0} may not exceed cache-size")]
    CacheSize(&'static str),
    /// The sizes of QEMU's caches, and their sum as well.
    #[error("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")]
    AllCacheSizes,
    /// An impossible size of what QEMU caches at a time.
    #[error("L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})")]
    CacheEntrySize {
        /// The image's cluster size in bytes.
        cluster_size: u64,
    },
    /// A way of decrypting for an image that is not encrypted.
    #[error("No encryption in image header, but options specified format '{0}'")]
    NotEncrypted(String),
    /// Zeroes are to be discarded where nothing is.
    #[error("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")]
    UnmapWithoutDiscard,
    /// `discard` with something else than it can have.
    #[error("Invalid discard option")]
    Discard,
    /// A node's name that cannot be one.
    #[error("Invalid node-name: '{0}'")]
    NodeName(String),
    /// Two nodes of one name.
    #[error("Duplicate nodes with node-name='{0}'")]
    DuplicateNodeName(String),
    /// A data file for an image without one.
    #[error("'data-file' can only be set for images with an external data file")]
    UnexpectedDataFile,
    /// Neither the image nor the user says where its data lie.
    #[error("'data-file' is required for this image")]
    NoDataFile,
    /// A node to lie on, for a format that cannot.
    #[error("Driver doesn't support backing files")]
    NoBackingSupport,
    /// A raw node's window that begins past the end of its file.
    #[error("Offset ({offset}) cannot be greater than size of the containing file ({actual})")]
    OffsetPastEnd {
        /// Where the window begins.
        offset: u64,
        /// Size of the file.
        actual: u64,
    },
    /// A raw node's window that ends past the end of its file.
    #[error(
        "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing file \
         ({actual})"
    )]
    WindowPastEnd {
        /// Where the window begins.
        offset: u64,
        /// Its size.
        size: u64,
        /// Size of the file.
        actual: u64,
    },
    /// A raw node's size that is not in whole sectors.
    #[error("Specified size is not multiple of 512")]
    UnalignedSize,
    /// A raw node whose size is a part of its description.
    #[error("Cannot resize fixed-size raw disks")]
    FixedSize,
    /// `file` for something else than a regular file, or `host_device` for one.
    #[error("'{driver}' driver requires '{name}' to be {}", if driver == "file" { "a regular file" } else { "either a character or block device" })]
    WrongFileType {
        /// The driver.
        driver: String,
        /// The file.
        name: String,
    },
    /// A read-only node that is to be written.
    #[error("Block node is read-only")]
    ReadOnly,
    /// A node for writing, shared with other writers.
    #[error("force-share=on can only be used with read-only images")]
    SharedWriting,
    /// Formats stacked in a way that is not handled.
    #[error("A {0} node on another format's node is not supported")]
    Stacking(String),
}

/// Options with flat, dotted keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Options(BTreeMap<String, OptionValue>);

impl Options {
    pub(crate) fn set(&mut self, key: &str, value: OptionValue) {
        self.0.insert(key.to_owned(), value);
    }

    pub(crate) fn get(&self, key: &str) -> Option<&OptionValue> {
        self.0.get(key)
    }

    pub(crate) fn take(&mut self, key: &str) -> Option<OptionValue> {
        self.0.remove(key)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A string; a value of another type is left, and so refused in the end.
    pub(crate) fn take_text(&mut self, key: &str) -> Option<String> {
        self.get(key)?.as_text()?;
        self.take(key).and_then(|value| value.as_text().map(str::to_owned))
    }

    pub(crate) fn take_bool(&mut self, key: &str) -> Result<Option<bool>, SpecError> {
        match self.take(key) {
            None => Ok(None),
            Some(OptionValue::Bool(value)) => Ok(Some(value)),
            Some(OptionValue::Text(text)) if ["on", "yes", "true", "y"].contains(&text.as_str()) => Ok(Some(true)),
            Some(OptionValue::Text(text)) if ["off", "no", "false", "n"].contains(&text.as_str()) => Ok(Some(false)),
            Some(_) => Err(SpecError::NotBool(key.to_owned())),
        }
    }

    pub(crate) fn take_size(&mut self, key: &str) -> Result<Option<u64>, SpecError> {
        self.take(key).map(|value| parse_size(key, &value)).transpose()
    }

    /// The options of a child, without its name in front.
    pub(crate) fn take_child(&mut self, child: &str) -> Self {
        let prefix = format!("{child}.");
        let keys: Vec<String> = self.0.keys().filter(|key| key.starts_with(&prefix)).cloned().collect();
        let options = keys.iter().filter_map(|key| Some((key[prefix.len()..].to_owned(), self.0.remove(key)?)));
        Self(options.collect())
    }

    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// The option that QEMU would name first among those that nobody took.
    pub(crate) fn leftover(&self) -> Option<&str> {
        self.0.keys().map(String::as_str).min_by_key(|key| bucket(key))
    }
}

fn parse_size(key: &str, value: &OptionValue) -> Result<u64, SpecError> {
    let (OptionValue::Text(text) | OptionValue::Number(text)) = value else {
        return Err(SpecError::NotSize(key.to_owned()));
    };
    let out_of_range = || SpecError::OutOfRange { option: key.to_owned(), value: text.clone() };
    match size_of_text(text) {
        Ok(size) => Ok(size),
        Err(SizeProblem::OutOfRange) => Err(out_of_range()),
        Err(SizeProblem::Malformed) => Err(SpecError::NotSize(key.to_owned())),
    }
}

enum SizeProblem {
    Malformed,
    OutOfRange,
}

/// A size as QEMU reads it: a decimal number, perhaps with a fraction, or a hexadecimal one, and a suffix.
fn size_of_text(text: &str) -> Result<u64, SizeProblem> {
    use SizeProblem::{Malformed, OutOfRange};
    let digits = text.trim_start();
    if digits.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        return Err(OutOfRange);
    }
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(Malformed),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u128 = whole.parse().map_err(|_| Malformed)?;
    let mut size = whole << shift;
    if !fraction.is_empty() {
        if shift == 0 || fraction.len() > 18 {
            return Err(Malformed);
        }
        let part: u128 = fraction.parse().map_err(|_| Malformed)?;
        let places = u32::try_from(fraction.len()).map_err(|_| Malformed)?;
        size += (part << shift) / 10_u128.pow(places);
    }
    u64::try_from(size).map_err(|_| OutOfRange)
}

/// Where QEMU keeps a key in its hash tables of 512 buckets, and so which key it comes to first.
pub(crate) fn bucket(key: &str) -> u32 {
    let seed = 0x238f_13af_u32.wrapping_mul(u32::try_from(key.len()).unwrap_or(u32::MAX));
    let sum = key.bytes().zip(0_u32..).fold(seed, |sum, (byte, i)| sum.wrapping_add(u32::from(byte) << (i * 5 % 24)));
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

/// An object as QEMU writes it in `json:` names.
pub(crate) fn nested_json(members: &[(&str, String)]) -> String {
    let mut members: Vec<&(&str, String)> = members.iter().collect();
    members.sort_by_key(|(key, _)| bucket(key));
    let members: Vec<String> = members.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
    format!("{{{}}}", members.join(", "))
}

impl OptionValue {
    /// The value as QEMU writes it in `json:` names.
    pub(crate) fn to_json(&self) -> String {
        match self {
            Self::Text(text) => serde_json::Value::from(text.as_str()).to_string(),
            Self::Number(number) => number.clone(),
            Self::Bool(value) => value.to_string(),
            Self::Null => "null".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_in_the_order_of_qemu() {
        let members = ["size", "file", "driver", "offset"].map(|key| (key, "1".to_owned()));
        assert_eq!(nested_json(&members), r#"{"offset": 1, "driver": 1, "size": 1, "file": 1}"#);
    }

    #[test]
    fn sizes_have_suffixes() {
        for (text, expected) in [
            ("512", Some(512)),
            ("1.5k", Some(1536)),
            ("2M", Some(2 << 20)),
            ("16E", None),
            ("5x", None),
            ("-1", None),
            ("", None),
        ] {
            let mut options = Options::default();
            options.set("size", OptionValue::Text(text.to_owned()));
            assert_eq!(options.take_size("size").ok().flatten(), expected, "{text}");
        }
    }
}

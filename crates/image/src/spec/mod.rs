//! Block nodes as users of QEMU describe them: by a file's name, by `json:{…}`, or by options such as
//! `driver=qcow2,file.filename=disk`.

mod json;
pub(crate) mod known;
mod options;

pub use options::{OptionValue, SpecError};
pub(crate) use options::{Options, bucket, nested_json};

use std::path::{Path, PathBuf};

/// What to open: a file's name, options, or both. Options are kept flat, as `file.filename`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeSpec {
    pub(crate) filename: Option<Filename>,
    pub(crate) options: Options,
}

/// A file's name, as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filename {
    pub(crate) path: PathBuf,
    /// Whether a word before a colon is a part of the name, and no protocol.
    pub(crate) literal: bool,
}

impl NodeSpec {
    /// What a file name on QEMU's command line or in a header stands for: a local file, with or without `file:` before it,
    /// or the options in a `json:` name.
    pub fn from_filename(name: impl AsRef<Path>) -> Result<Self, SpecError> {
        let path = name.as_ref();
        match path.to_str().and_then(|name| name.strip_prefix("json:")) {
            Some(text) => Ok(Self { filename: None, options: json::parse_options(text)? }),
            None => {
                let filename = Filename { path: path.to_owned(), literal: false };
                Ok(Self { filename: Some(filename), options: Options::default() })
            }
        }
    }

    /// A local file, whatever its name looks like.
    #[must_use]
    pub fn from_path(path: impl AsRef<Path>) -> Self {
        let filename = Filename { path: path.as_ref().to_owned(), literal: true };
        Self { filename: Some(filename), options: Options::default() }
    }

    /// What options with dotted keys stand for, as those of `--image-opts`. Later ones replace earlier ones.
    #[must_use]
    pub fn from_options<K: Into<String>, V: Into<String>>(options: impl IntoIterator<Item = (K, V)>) -> Self {
        options
            .into_iter()
            .fold(Self::default(), |spec, (key, value)| spec.with(&key.into(), OptionValue::Text(value.into())))
    }

    /// Names the driver, and so the format, in place of what the description says.
    #[must_use]
    pub fn with_driver(self, driver: &str) -> Self {
        self.with("driver", OptionValue::Text(driver.to_owned()))
    }

    /// Sets one more option.
    #[must_use]
    pub fn with(mut self, key: &str, value: OptionValue) -> Self {
        self.options.set(key, value);
        self
    }

    /// The value of an option, if it was given.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&OptionValue> {
        self.options.get(key)
    }
}

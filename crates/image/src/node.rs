use std::borrow::Cow;

use crate::OptionValue;
use crate::spec::nested_json;

/// A block node as QEMU shows it: its driver, its name, and the node beneath that holds its data.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) driver: &'static str,
    /// The name of a file, or a `json:` name where that would not say everything.
    pub(crate) filename: String,
    /// Size in bytes of what the node shows.
    pub(crate) size: u64,
    pub(crate) file: Option<Box<Node>>,
    /// What was given that the name must repeat.
    options: Vec<(&'static str, OptionValue)>,
}

impl Node {
    /// A file on the host.
    pub(crate) fn of_file(driver: &'static str, filename: Cow<'_, str>, size: u64) -> Self {
        Self { driver, filename: filename.into_owned(), size, file: None, options: Vec::new() }
    }

    /// A format's node on `file`.
    pub(crate) fn on(driver: &'static str, file: Self, size: u64, options: Vec<(&'static str, OptionValue)>) -> Self {
        let plain = file.file.is_none() && options.is_empty();
        let filename = if plain { file.filename.clone() } else { String::new() };
        let mut node = Self { driver, filename, size, file: Some(Box::new(file)), options };
        if !plain {
            node.filename = format!("json:{}", node.to_json());
        }
        node
    }

    fn to_json(&self) -> String {
        let text = |text: &str| OptionValue::Text(text.to_owned()).to_json();
        let mut members = vec![("driver", text(self.driver))];
        match &self.file {
            Some(file) => members.push(("file", file.to_json())),
            None => members.push(("filename", text(&self.filename))),
        }
        members.extend(self.options.iter().map(|(key, value)| (*key, value.to_json())));
        nested_json(&members)
    }
}

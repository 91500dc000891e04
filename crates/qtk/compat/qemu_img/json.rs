//! JSON as QEMU writes it.

use std::fmt::Write as _;
use std::io::{self, Write};

use serde_json::Value;

use super::message::Failure;

/// What `--output` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    #[default]
    Human,
    Json,
}

impl Output {
    pub(crate) fn from_argument(name: Option<&str>) -> Result<Self, Failure> {
        name.map_or(Ok(Self::Human), Self::from_name)
    }

    pub(crate) fn from_name(name: &str) -> Result<Self, Failure> {
        match name {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(Failure::new("--output must be used with human or json as argument.")),
        }
    }
}

/// Prints a value, indented, with a newline.
pub(crate) fn print(value: &Value) -> io::Result<()> {
    let mut text = String::new();
    write_value(&mut text, value, 0);
    writeln!(io::stdout(), "{text}")
}

fn write_value(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(items) => {
            write_items(out, depth, ['[', ']'], items, |out, item| write_value(out, item, depth + 1))
        }
        Value::Object(members) => write_items(out, depth, ['{', '}'], members, |out, (key, value)| {
            write_string(out, key);
            out.push_str(": ");
            write_value(out, value, depth + 1);
        }),
        Value::String(text) => write_string(out, text),
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// Each item on a line of its own, and the closing bracket too, even if there is none.
fn write_items<T>(
    out: &mut String,
    depth: usize,
    brackets: [char; 2],
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(&mut String, T),
) {
    out.push(brackets[0]);
    for (index, item) in items.into_iter().enumerate() {
        out.push_str(if index == 0 { "\n" } else { ",\n" });
        indent(out, depth + 1);
        write(out, item);
    }
    out.push('\n');
    indent(out, depth);
    out.push(brackets[1]);
}

fn indent(out: &mut String, depth: usize) {
    out.extend(std::iter::repeat_n("    ", depth));
}

fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                // Writing to a string does not fail.
                let _ = write!(out, "\\u{unit:04X}");
            }),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn writes_what_qemu_writes() {
        let mut text = String::new();
        write_value(&mut text, &json!({ "a": [], "b": [1, "é\u{1f600}\u{7f}\"\\\t"], "c": { "d": true } }), 0);
        let expected = "{\n    \"a\": [\n    ],\n    \"b\": [\n        1,\n        \"\\u00E9\\uD83D\\uDE00\\u007F\\\"\\\\\\t\"\n    ],\n    \
                        \"c\": {\n        \"d\": true\n    }\n}";
        assert_eq!(text, expected);
    }
}

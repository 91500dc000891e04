//! Lists of options, `key=value,key,nokey`, and what QEMU says of wrong ones.

use super::message::{self, Failure};
use super::size::{NumberError, number, size};

/// What kind of value a parameter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Bool,
    Number,
    Size,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "str",
            Self::Bool => "bool (on/off)",
            Self::Number => "num",
            Self::Size => "size",
        }
    }
}

/// A parameter that a list of options may set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameter {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) help: &'static str,
    /// What it is where it is not set.
    pub(crate) default: Option<&'static str>,
}

/// The values of a list of options, checked against the parameters that may be set.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    parameters: Vec<Parameter>,
    /// In the order in which they were set.
    set: Vec<(&'static str, Value)>,
}

#[derive(Clone, Debug)]
struct Value {
    text: String,
    number: u64,
}

/// Adds the argument of one more `-o` to those before it.
pub(crate) fn append(list: &mut Option<String>, more: &str) -> Result<(), Failure> {
    let commas = more.bytes().rev().take_while(|&byte| byte == b',').count();
    if more.is_empty() || more.starts_with(',') || commas % 2 == 1 {
        return Err(Failure::new(format!("Invalid option list: {more}")));
    }
    match list {
        Some(list) => {
            list.push(',');
            list.push_str(more);
        }
        None => *list = Some(more.to_owned()),
    }
    Ok(())
}

/// Whether a list of options is a question for what can be set.
pub(crate) fn asks_for_help(list: &str) -> bool {
    Pairs::new(list, None).any(|(word, has_value, _)| !has_value && matches!(word.as_str(), "help" | "?"))
}

/// Keys and values of a list. A key alone is `on`, or `off` if it begins with `no`; the very first word alone is the value
/// of `implied`, if there is such a key.
pub(crate) fn pairs(list: &str, implied: Option<&str>) -> Vec<(String, String)> {
    let pair = |(key, has_value, value): (String, bool, String)| match key.strip_prefix("no") {
        _ if has_value => (key, value),
        Some(key) => (key.to_owned(), "off".to_owned()),
        None => (key, "on".to_owned()),
    };
    Pairs::new(list, implied).map(pair).collect()
}

/// Warns of keys without a value, where QEMU does.
pub(crate) fn warn_of_short_forms(list: &str, implied: Option<&str>) {
    for (word, ..) in Pairs::new(list, implied).filter(|(_, has_value, _)| !has_value) {
        let (key, value) = word.strip_prefix("no").map_or((word.as_str(), "on"), |key| (key, "off"));
        message::warn(&format!("short-form boolean option '{word}' deprecated\nPlease use {key}={value} instead"));
    }
}

/// The words of a list: the key, whether it has a value, and the value.
struct Pairs<'a> {
    rest: &'a str,
    implied: Option<&'a str>,
}

impl<'a> Pairs<'a> {
    fn new(rest: &'a str, implied: Option<&'a str>) -> Self {
        Self { rest, implied }
    }

    /// Takes a value, in which a comma is written twice, and the comma behind it.
    fn value(&mut self) -> String {
        let mut value = String::new();
        while let Some(comma) = self.rest.find(',') {
            value.push_str(&self.rest[..comma]);
            self.rest = &self.rest[comma + 1..];
            match self.rest.strip_prefix(',') {
                Some(rest) => {
                    value.push(',');
                    self.rest = rest;
                }
                None => return value,
            }
        }
        value.push_str(std::mem::take(&mut self.rest));
        value
    }
}

impl Iterator for Pairs<'_> {
    type Item = (String, bool, String);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let end = self.rest.find(['=', ',']).unwrap_or(self.rest.len());
        let has_value = self.rest[end..].starts_with('=');
        if let Some(implied) = self.implied.take().filter(|_| !has_value) {
            return Some((implied.to_owned(), true, self.value()));
        }
        let key = self.rest[..end].to_owned();
        self.rest = self.rest.get(end + 1..).unwrap_or_default();
        let value = if has_value { self.value() } else { String::new() };
        Some((key, has_value, value))
    }
}

impl Values {
    /// No values yet.
    pub(crate) fn new(parameters: impl IntoIterator<Item = Parameter>) -> Self {
        Self { parameters: parameters.into_iter().collect(), set: Vec::new() }
    }

    /// Sets what a list says, in its order, until something is wrong. An `id` is passed over, as QEMU does.
    pub(crate) fn set_list(&mut self, list: &str) -> Result<(), Failure> {
        pairs(list, None).iter().filter(|(key, _)| key != "id").try_for_each(|(key, value)| self.set(key, value))
    }

    /// Sets one parameter.
    pub(crate) fn set(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let Some(parameter) = self.parameters.iter().find(|parameter| parameter.name == name) else {
            return Err(Failure::new(format!("Invalid parameter '{name}'")));
        };
        let number = match parameter.kind {
            Kind::Text => 0,
            Kind::Bool => u64::from(boolean(name, text)?),
            Kind::Number => number(text).map_err(|error| not_a_number(name, text, error))?,
            Kind::Size => size_value(name, text)?,
        };
        self.set.push((parameter.name, Value { text: text.to_owned(), number }));
        Ok(())
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.set.iter().rev().find(|(set, _)| *set == name).map(|(_, value)| value)
    }

    /// Whether a parameter was set.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The names that were set, in the order in which they were.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.set.iter().map(|(name, _)| *name)
    }

    /// A value as it was written, or its default.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        let default = || self.parameters.iter().find(|parameter| parameter.name == name)?.default;
        self.get(name).map(|value| value.text.as_str()).or_else(default)
    }

    /// A value that was set, if it is a number, a size or a boolean.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.get(name).map(|value| value.number)
    }

    /// A boolean that was set.
    pub(crate) fn boolean(&self, name: &str) -> Option<bool> {
        self.number(name).map(|value| value != 0)
    }

    /// What is set, or is so by default, as `create` and `convert` print it: in the order of the parameters, each with a
    /// space in front.
    pub(crate) fn summary(&self) -> String {
        let words = self.parameters.iter().filter_map(|parameter| {
            let value = match (self.get(parameter.name), parameter.kind) {
                (Some(value), Kind::Number | Kind::Size) => value.number.cast_signed().to_string(),
                (Some(value), Kind::Text) => value.text.replace(',', ",,"),
                (Some(value), Kind::Bool) => value.text.clone(),
                (None, _) => parameter.default?.to_owned(),
            };
            Some(format!(" {}={value}", parameter.name))
        });
        words.collect()
    }
}

/// The lines of `-o help`, in alphabetical order.
pub(crate) fn help(parameters: impl IntoIterator<Item = Parameter>) -> String {
    let mut lines: Vec<String> = parameters.into_iter().map(help_line).collect();
    lines.sort();
    lines.concat()
}

fn help_line(parameter: Parameter) -> String {
    let usage = format!("{}=<{}>", parameter.name, parameter.kind.name());
    format!("  {usage:<22} - {}\n", parameter.help)
}

/// `on` or `off`, as QEMU spells them.
pub(crate) fn boolean(name: &str, text: &str) -> Result<bool, Failure> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Failure::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// A size, as the value of a parameter.
pub(crate) fn size_value(name: &str, text: &str) -> Result<u64, Failure> {
    size(text).map_err(|error| not_a_size(name, text, error))
}

fn not_a_number(name: &str, text: &str, error: NumberError) -> Failure {
    Failure::new(match error {
        NumberError::Malformed => format!("Parameter '{name}' expects a number"),
        NumberError::OutOfRange => format!("Value '{text}' is too large for parameter '{name}'"),
    })
}

fn not_a_size(name: &str, text: &str, error: NumberError) -> Failure {
    match error {
        NumberError::OutOfRange => Failure::new(format!("Value '{text}' is out of range for parameter '{name}'")),
        NumberError::Malformed => Failure::new(format!("Parameter '{name}' expects a non-negative number below 2^64")).hint(
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs_of(list: &str, implied: Option<&str>) -> Vec<String> {
        pairs(list, implied).into_iter().map(|(key, value)| format!("{key}:{value}")).collect()
    }

    #[test]
    fn splits_lists() {
        assert_eq!(pairs_of("a=1,b,noc,d=x,,y,e=", None), ["a:1", "b:on", "c:off", "d:x,y", "e:"]);
        assert_eq!(pairs_of("a=1,,,b", None), ["a:1,", "b:on"]);
        assert_eq!(pairs_of("x,,y,a=1", Some("driver")), ["driver:x,y", "a:1"]);
        assert_eq!(pairs_of("a=1,x", Some("driver")), ["a:1", "x:on"]);
        assert_eq!(pairs_of("", Some("driver")), [""; 0]);
    }

    #[test]
    fn refuses_lists_that_begin_or_end_with_a_comma() {
        for list in ["", ",", ",,a", "a,", "a,,,"] {
            assert!(append(&mut None, list).is_err(), "{list}");
        }
        let mut list = None;
        append(&mut list, "a=1,,").unwrap();
        append(&mut list, "b").unwrap();
        assert_eq!(list.as_deref(), Some("a=1,,,b"));
    }

    #[test]
    fn knows_a_call_for_help() {
        for (list, help) in
            [("help", true), ("a=b,?", true), ("help=1", false), ("a=,help", true), ("a=b,,help", false)]
        {
            assert_eq!(asks_for_help(list), help, "{list}");
        }
    }

    #[test]
    fn checks_values() {
        let parameter = |name, kind| Parameter { name, kind, help: "", default: None };
        let mut values =
            Values::new([parameter("size", Kind::Size), parameter("on", Kind::Bool), parameter("name", Kind::Text)]);
        values.set_list("id=x,name=a,,b,size=1k,noon").unwrap();
        assert_eq!(values.summary(), " size=1024 on=off name=a,,b");
        assert_eq!(
            (values.number("size"), values.boolean("on"), values.text("name")),
            (Some(1024), Some(false), Some("a,b"))
        );
        for (list, message) in [
            ("foo=1", "Invalid parameter 'foo'"),
            ("on=1", "Parameter 'on' expects 'on' or 'off'"),
            ("size=-1", "Value '-1' is out of range for parameter 'size'"),
        ] {
            assert_eq!(values.set_list(list).unwrap_err().to_string(), message);
        }
    }
}

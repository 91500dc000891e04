//! The JSON that QEMU reads: as everybody's, and strings may stand between single quotes.

use super::{OptionValue, Options, SpecError};

const MAX_DEPTH: usize = 1024;

/// The options of the object in `text`, with nested keys joined by dots.
pub(super) fn parse_options(text: &str) -> Result<Options, SpecError> {
    let mut parser = Parser { rest: text, depth: 0 };
    let value = parser.document().map_err(SpecError::Json)?;
    let Json::Object(members) = value else { return Err(SpecError::NotAnObject) };
    let mut options = Options::default();
    members.into_iter().for_each(|(key, value)| flatten(&mut options, key, value));
    Ok(options)
}

fn flatten(options: &mut Options, key: String, value: Json) {
    match value {
        Json::Scalar(value) => options.set(&key, value),
        Json::Object(members) => {
            members.into_iter().for_each(|(name, value)| flatten(options, format!("{key}.{name}"), value));
        }
        Json::Array(values) => {
            values.into_iter().zip(0..).for_each(|(value, i)| flatten(options, format!("{key}.{i}"), value));
        }
    }
}

enum Json {
    Scalar(OptionValue),
    Object(Vec<(String, Self)>),
    Array(Vec<Self>),
}

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

/// What QEMU says of text that is no JSON.
type Problem = String;

fn parse_error(what: &str) -> Problem {
    format!("JSON parse error, {what}")
}

impl Parser<'_> {
    fn document(&mut self) -> Result<Json, Problem> {
        if self.peek().is_none() {
            return Err("Expecting a JSON value".to_owned());
        }
        let value = self.value()?;
        match self.peek() {
            None => Ok(value),
            Some(_) => Err("Expecting at most one JSON value".to_owned()),
        }
    }

    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        self.rest.chars().next()
    }

    /// Goes past `expected` if it comes next.
    fn eat(&mut self, expected: char) -> bool {
        let found = self.peek() == Some(expected);
        if found {
            self.rest = &self.rest[expected.len_utf8()..];
        }
        found
    }

    fn end(&self) -> Problem {
        parse_error("premature EOI")
    }

    fn value(&mut self) -> Result<Json, Problem> {
        match self.peek().ok_or_else(|| self.end())? {
            '{' => self.nested(Self::object),
            '[' => self.nested(Self::array),
            '"' | '\'' => Ok(Json::Scalar(OptionValue::Text(self.string()?))),
            '-' | '0'..='9' => self.number(),
            'a'..='z' => self.keyword(),
            '}' | ']' | ',' | ':' => Err(parse_error("expecting value")),
            other => Err(parse_error(&format!("stray '{other}'"))),
        }
    }

    fn nested(&mut self, parse: fn(&mut Self) -> Result<Json, Problem>) -> Result<Json, Problem> {
        self.rest = &self.rest[1..];
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("JSON nesting depth limit exceeded".to_owned());
        }
        let value = parse(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn object(&mut self) -> Result<Json, Problem> {
        let mut members: Vec<(String, Json)> = Vec::new();
        if self.eat('}') {
            return Ok(Json::Object(members));
        }
        loop {
            let Json::Scalar(OptionValue::Text(key)) = self.value()? else {
                return Err(parse_error("key is not a string in object"));
            };
            if !self.eat(':') {
                return Err(self.peek().map_or_else(|| self.end(), |_| parse_error("missing : in object pair")));
            }
            let value = self.value()?;
            if members.iter().any(|(known, _)| *known == key) {
                return Err(parse_error("duplicate key"));
            }
            members.push((key, value));
            if self.eat('}') {
                return Ok(Json::Object(members));
            }
            if !self.eat(',') {
                return Err(self.peek().map_or_else(|| self.end(), |_| parse_error("expected separator in dict")));
            }
        }
    }

    fn array(&mut self) -> Result<Json, Problem> {
        let mut values = Vec::new();
        if self.eat(']') {
            return Ok(Json::Array(values));
        }
        loop {
            values.push(self.value()?);
            if self.eat(']') {
                return Ok(Json::Array(values));
            }
            if !self.eat(',') {
                return Err(self.peek().map_or_else(|| self.end(), |_| parse_error("expected separator in list")));
            }
        }
    }

    fn string(&mut self) -> Result<String, Problem> {
        let whole = self.rest;
        let stray = || parse_error(&format!("stray '{whole}'"));
        let mut chars = whole.char_indices();
        let (_, quote) = chars.next().ok_or_else(stray)?;
        let mut text = String::new();
        loop {
            match chars.next().ok_or_else(stray)? {
                (at, c) if c == quote => {
                    self.rest = &whole[at + c.len_utf8()..];
                    return Ok(text);
                }
                (_, '\\') => text.push(escaped(&mut chars)?),
                (_, c) if c < ' ' => return Err(stray()),
                (_, c) => text.push(c),
            }
        }
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> &str {
        let end = self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn number(&mut self) -> Result<Json, Problem> {
        let word = self.word(|c| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E')).to_owned();
        match serde_json::from_str::<serde_json::Number>(&word) {
            Ok(_) => Ok(Json::Scalar(OptionValue::Number(word))),
            Err(_) => Err(parse_error(&format!("stray '{word}'"))),
        }
    }

    fn keyword(&mut self) -> Result<Json, Problem> {
        match self.word(|c| c.is_ascii_lowercase()) {
            "true" => Ok(Json::Scalar(OptionValue::Bool(true))),
            "false" => Ok(Json::Scalar(OptionValue::Bool(false))),
            "null" => Ok(Json::Scalar(OptionValue::Null)),
            other => Err(parse_error(&format!("invalid keyword '{other}'"))),
        }
    }
}

/// The character that an escape sequence stands for, after its backslash.
fn escaped(chars: &mut std::str::CharIndices<'_>) -> Result<char, Problem> {
    let invalid = || parse_error("invalid escape sequence in string");
    Ok(match chars.next().ok_or_else(invalid)?.1 {
        c @ ('"' | '\'' | '\\' | '/') => c,
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'u' => {
            let first = unit(chars).ok_or_else(invalid)?;
            if !(0xd800..0xdc00).contains(&first) {
                return char::from_u32(first).filter(|&c| c != '\0').ok_or_else(invalid);
            }
            let marked = chars.next().is_some_and(|(_, c)| c == '\\') && chars.next().is_some_and(|(_, c)| c == 'u');
            let second =
                unit(chars).filter(|second| marked && (0xdc00..0xe000).contains(second)).ok_or_else(invalid)?;
            char::from_u32(0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)).ok_or_else(invalid)?
        }
        _ => return Err(invalid()),
    })
}

fn unit(chars: &mut std::str::CharIndices<'_>) -> Option<u32> {
    (0..4).try_fold(0, |sum, _| Some(sum * 16 + chars.next()?.1.to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        parse_options(text).unwrap_err().to_string()
    }

    #[test]
    fn nested_keys_become_dotted() {
        let options =
            parse_options(r#"{"driver": 'qcow2', "file": {"filename": "a\u0041\"", "x": [1, true]}, "b": null}"#)
                .unwrap();
        for (key, expected) in [
            ("driver", OptionValue::Text("qcow2".to_owned())),
            ("file.filename", OptionValue::Text("aA\"".to_owned())),
            ("file.x.0", OptionValue::Number("1".to_owned())),
            ("file.x.1", OptionValue::Bool(true)),
            ("b", OptionValue::Null),
        ] {
            assert_eq!(options.get(key), Some(&expected), "{key}");
        }
    }

    #[test]
    fn mistakes_are_named_as_in_qemu() {
        for (text, expected) in [
            ("{", "premature EOI"),
            ("{'a':1,}", "expecting value"),
            ("{'a':1 'b':2}", "expected separator in dict"),
            ("{'a':foo}", "invalid keyword 'foo'"),
            ("{'a':'b", "stray ''b'"),
            ("{5:1}", "key is not a string in object"),
            ("{'a':1,'a':2}", "duplicate key"),
            ("{'a':@}", "stray '@'"),
            ("{'a':'\\x'}", "invalid escape sequence in string"),
        ] {
            assert_eq!(
                problem(text),
                format!("Could not parse the JSON options: JSON parse error, {expected}"),
                "{text}"
            );
        }
        assert_eq!(problem("{} x"), "Could not parse the JSON options: Expecting at most one JSON value");
        assert_eq!(problem(""), "Could not parse the JSON options: Expecting a JSON value");
        assert_eq!(problem("[]"), "Invalid JSON object given");
    }
}

//! `--object`: what QEMU would make for the command to refer to.

use serde_json::{Map, Value};

use super::keyval;
use super::message::Failure;
use super::words;

/// What a secret can have.
const SECRET: &[&str] = &["qom-type", "id", "data", "file", "format", "iv", "keyid"];

/// Other objects that QEMU's tools know. They are of no use to a command that works on files.
const OTHERS: &[&str] =
    &["authz-list", "authz-simple", "throttle-group", "tls-creds-anon", "tls-creds-psk", "tls-creds-x509"];

/// Checks the definition of an object. Nothing is kept of it, as no encrypted data is read.
pub(crate) fn define(definition: &str) -> Result<(), Failure> {
    let properties = properties(definition)?;
    let property = |name: &str| properties.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let kind = property("qom-type").ok_or_else(|| missing("qom-type"))?;
    if kind != "secret" && !OTHERS.contains(&kind) {
        return Err(Failure::new(format!("Parameter 'qom-type' does not accept value '{kind}'")));
    }
    let id = property("id").ok_or_else(|| missing("id"))?;
    if kind == "secret" {
        check_secret(&properties, property("data"), property("file"))?;
    }
    if !is_identifier(id) {
        return Err(Failure::new("Parameter 'id' expects an identifier")
            .hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."));
    }
    Ok(())
}

fn check_secret(properties: &[(String, String)], data: Option<&str>, file: Option<&str>) -> Result<(), Failure> {
    if let Some((name, _)) = properties.iter().find(|(name, _)| !SECRET.contains(&name.as_str())) {
        return Err(Failure::new(format!("Parameter '{name}' is unexpected")));
    }
    match (data, file) {
        (None, None) => Err(Failure::new("Either 'file' or 'data' must be provided")),
        (Some(_), Some(_)) => Err(Failure::new("'file' and 'data' are mutually exclusive")),
        (Some(_), None) => Ok(()),
        (None, Some(file)) => std::fs::read(file).map(drop).map_err(|error| {
            let why = words::system(&error);
            Failure::new(format!("Unable to read {file}: Failed to open file \u{201c}{file}\u{201d}: {why}"))
        }),
    }
}

fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The properties that a list of options or a JSON object sets.
fn properties(definition: &str) -> Result<Vec<(String, String)>, Failure> {
    if !definition.starts_with('{') {
        return Ok(keyval::pairs(definition, Some("qom-type")));
    }
    let object: Map<String, Value> =
        serde_json::from_str(definition).map_err(|_| Failure::new("JSON parse error, invalid object"))?;
    let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Ok(object.into_iter().map(|(key, value)| (key, text(value))).collect())
}

fn missing(name: &str) -> Failure {
    Failure::new(format!("Parameter '{name}' is missing"))
}

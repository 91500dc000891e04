//! `--object`: what QEMU would make for the command to refer to.

use serde_json::{Map, Value};

use super::keyval;
use super::message::Failure;

/// Checks the definition of an object. Of a secret nothing is kept, as no encrypted data is read; other objects are of no
/// use to a command that works on files.
pub(crate) fn define(definition: &str) -> Result<(), Failure> {
    let properties = properties(definition)?;
    let property = |name: &str| properties.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let kind = property("qom-type").ok_or_else(|| missing("qom-type"))?;
    if !matches!(
        kind,
        "secret"
            | "iothread"
            | "throttle-group"
            | "tls-creds-anon"
            | "tls-creds-psk"
            | "tls-creds-x509"
            | "authz-simple"
    ) {
        return Err(Failure::new(format!("Parameter 'qom-type' does not accept value '{kind}'")));
    }
    property("id").ok_or_else(|| missing("id"))?;
    if kind == "secret" {
        match (property("data"), property("file")) {
            (None, None) => return Err(Failure::new("Either 'file' or 'data' must be provided")),
            (Some(_), Some(_)) => return Err(Failure::new("'file' and 'data' are mutually exclusive")),
            _ => {}
        }
    }
    Ok(())
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

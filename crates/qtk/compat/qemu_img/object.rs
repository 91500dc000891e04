//! `--object`: what QEMU would make for the command to refer to.

use super::keyval;
use super::message::Failure;

/// Checks the definition of an object. Of a secret nothing is kept, as no encrypted data is read; other objects are of no
/// use to a command that works on files.
pub(crate) fn define(definition: &str) -> Result<(), Failure> {
    let properties = keyval::pairs(definition, Some("qom-type"));
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

fn missing(name: &str) -> Failure {
    Failure::new(format!("Parameter '{name}' is missing"))
}

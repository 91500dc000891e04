use std::fmt::Write as _;

use qtk_qcow2::{Snapshot, features};
use serde_json::Value;

use super::ImageInfo;

/// Tells a time, in seconds since 1970, by the user's clock: `2026-11-21 09:59:40`.
pub type LocalTime<'a> = dyn Fn(u64) -> String + 'a;

impl ImageInfo {
    /// What `qemu-img info` prints about the image.
    #[must_use]
    pub fn to_text(&self, local_time: &LocalTime<'_>) -> String {
        let mut text = Text { text: String::new(), local_time };
        text.image(self, 0, false);
        self.children(&mut text, 0, "");
        text.text
    }

    fn children(&self, text: &mut Text<'_>, level: usize, path: &str) {
        let Some(file) = &self.file else { return };
        let path = format!("{path}/file");
        text.line(level, format_args!("Child node '{path}':"));
        text.image(file, level + 1, file.file.is_none());
        file.children(text, level + 1, &path);
    }
}

struct Text<'a> {
    text: String,
    local_time: &'a LocalTime<'a>,
}

impl Text<'_> {
    fn line(&mut self, level: usize, content: std::fmt::Arguments<'_>) {
        for _ in 0..level {
            self.text.push_str("    ");
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{content}");
    }

    fn image(&mut self, info: &ImageInfo, level: usize, is_protocol: bool) {
        let size = format!("{} ({} bytes)", human_size(info.virtual_size), info.virtual_size);
        if is_protocol {
            self.line(level, format_args!("filename: {}", info.filename));
            self.line(level, format_args!("protocol type: {}", info.driver));
            self.line(level, format_args!("file length: {size}"));
        } else {
            self.line(level, format_args!("image: {}", info.filename));
            self.line(level, format_args!("file format: {}", info.driver));
            self.line(level, format_args!("virtual size: {size}"));
        }
        self.line(level, format_args!("disk size: {}", human_size(info.actual_size)));
        if let Some(qcow2) = &info.qcow2 {
            self.qcow2(qcow2, level);
        }
        if let Some(Value::Object(data)) = info.format_specific()
            && !data.is_empty()
        {
            self.line(level, format_args!("Format specific information:"));
            self.value(level + 1, &Value::Object(data));
        }
    }

    fn qcow2(&mut self, qcow2: &super::Qcow2Info, level: usize) {
        if qcow2.encryption.is_some() {
            self.line(level, format_args!("encrypted: yes"));
        }
        self.line(level, format_args!("cluster_size: {}", qcow2.cluster_size));
        if qcow2.has(features::DIRTY) {
            self.line(level, format_args!("cleanly shut down: no"));
        }
        if let Some(name) = &qcow2.backing_name {
            match &qcow2.backing_path {
                Some(path) if path != name => {
                    self.line(level, format_args!("backing file: {name} (actual path: {path})"));
                }
                _ => self.line(level, format_args!("backing file: {name}")),
            }
            if let Some(format) = &qcow2.backing_format {
                self.line(level, format_args!("backing file format: {format}"));
            }
        }
        if !qcow2.snapshots.is_empty() {
            for line in snapshot_table(&qcow2.snapshots, self.local_time).lines() {
                self.line(level, format_args!("{line}"));
            }
        }
    }

    /// A structure that only its driver knows, member by member.
    fn value(&mut self, level: usize, value: &Value) {
        let members: Vec<(String, &Value)> = match value {
            Value::Object(members) => members.iter().map(|(key, value)| (key.replace('-', " "), value)).collect(),
            Value::Array(values) => values.iter().enumerate().map(|(i, value)| (format!("[{i}]"), value)).collect(),
            _ => return,
        };
        for (key, value) in members {
            match value {
                Value::Object(_) | Value::Array(_) => {
                    self.line(level, format_args!("{key}:"));
                    self.value(level + 1, value);
                }
                Value::String(text) => self.line(level, format_args!("{key}: {text}")),
                other => self.line(level, format_args!("{key}: {other}")),
            }
        }
    }
}

/// The table of `qemu-img snapshot -l`, with its heading.
#[must_use]
pub fn snapshot_table(snapshots: &[Snapshot], local_time: &LocalTime<'_>) -> String {
    let heading = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"].map(str::to_owned);
    let mut text = format!("Snapshot list:\n{}\n", row(&heading));
    for snapshot in snapshots {
        let milliseconds = snapshot.vm_clock_nsec / 1_000_000;
        let seconds = milliseconds / 1000;
        let clock =
            format!("{:04}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, milliseconds % 1000);
        let columns = [
            snapshot.id.clone(),
            snapshot.name.clone(),
            human_size(snapshot.vm_state_size),
            local_time(snapshot.taken.0.into()),
            clock,
            snapshot.icount.map_or_else(|| "--".to_owned(), |count| count.to_string()),
        ];
        text.push_str(&row(&columns));
        text.push('\n');
    }
    text
}

/// Columns as wide as in QEMU, which counts bytes.
fn row([id, tag, size, date, clock, icount]: &[String; 6]) -> String {
    let left = |text: &str, width: usize| format!("{text}{}", " ".repeat(width.saturating_sub(text.len())));
    format!("{} {} {size:>8} {date:>19} {clock:>15} {icount:>10}", left(id, 7), left(tag, 16))
}

/// A size as `qemu-img` shows it: three significant digits, in units of 1024, of which there are never a thousand.
#[must_use]
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && u128::from(bytes) >= 1000_u128 << (10 * unit) {
        unit += 1;
    }
    // A double has more digits than are shown.
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// A number below a thousand as `%0.3g` prints it.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        value if value < 0.9995 => 3,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        value if value < 999.5 => 0,
        _ => return "1e+03".to_owned(),
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_qemu_img() {
        for (bytes, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536 << 20, "1.5 GiB"),
            (197_120, "192 KiB"),
            (1_442_304, "1.38 MiB"),
            (1_047_552, "0.999 MiB"),
            (1_072_693_248, "0.999 GiB"),
            (5_506_148_073_472, "5.01 TiB"),
            (1_023_590, "1e+03 KiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), expected, "{bytes}");
        }
    }
}

//! What no two runs have in common.

/// Replaces the folder's path, host sizes and times in what a tool printed.
pub(crate) fn mask(text: &str, folder: &str) -> String {
    let text = text.replace(folder, "FOLDER");
    text.split_inclusive('\n').map(|line| mask_line(&without_node_names(&without_steps(line)))).collect()
}

/// Drops from human-readable output what depends on where clusters lie in a file.
pub(crate) fn without_places(text: &str) -> String {
    text.split_inclusive('\n').map(without_place).collect()
}

fn without_place(line: &str) -> String {
    match [" allocated, ", "file length: ", "Image end offset: "].iter().find_map(|mark| line.split_once(mark)) {
        Some((before, _)) => format!("{before}...\n"),
        None => line.to_owned(),
    }
}

/// QEMU numbers the nodes of its graph, `#block123`.
fn without_node_names(line: &str) -> String {
    let mut parts = line.split("#block");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, part| line + "#blockN" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// Of the reports of a command's progress the first and the last: how many there are between depends on the clock, and on
/// how a tool counts.
fn without_steps(line: &str) -> String {
    let is_step = |part: &str| part.starts_with("    (") && part.ends_with("/100%)\r");
    let at_an_end = |part: &str| part.starts_with("    (0.00/") || part.starts_with("    (100.00/");
    let mut kept: Vec<&str> = line.split_inclusive('\r').filter(|part| !is_step(part) || at_an_end(part)).collect();
    kept.dedup_by(|next, last| is_step(next) && next == last);
    kept.concat()
}

fn mask_line(line: &str) -> String {
    for (mark, mut end) in [
        ("disk size: ", "\n"),
        ("\"actual-size\": ", ",\n"),
        ("\"date-sec\": ", ",\n"),
        ("\"date-nsec\": ", ",\n"),
        ("Run completed in ", " seconds"),
        ("    uuid: ", "\n"),
    ] {
        if let Some((before, after)) = line.split_once(mark) {
            if end == ",\n" && !after.contains(',') {
                end = "\n";
            }
            let rest = after.find(end).map_or("", |at| &after[at..]);
            return format!("{before}{mark}...{rest}");
        }
    }
    mask_date(line)
}

/// A snapshot's date, `2026-11-20 10:00:00`.
fn mask_date(line: &str) -> String {
    const SHAPE: &[u8] = b"0000-00-00 00:00:00";
    let alike = |window: &[u8]| {
        window.iter().zip(SHAPE).all(|(byte, shape)| if *shape == b'0' { byte.is_ascii_digit() } else { byte == shape })
    };
    match line.as_bytes().windows(SHAPE.len()).position(alike) {
        Some(at) => format!("{}YYYY-MM-DD hh:mm:ss{}", &line[..at], &line[at + SHAPE.len()..]),
        None => line.to_owned(),
    }
}

#[test]
fn sizes_times_and_folders_are_masked() {
    for (line, masked) in [
        ("disk size: 196 KiB\n", "disk size: ...\n"),
        ("        \"actual-size\": 4096,\n", "        \"actual-size\": ...,\n"),
        ("\"date-sec\": 12\n", "\"date-sec\": ...\n"),
        ("1 one 0 B 2026-11-20 10:00:00 0\n", "1 one 0 B YYYY-MM-DD hh:mm:ss 0\n"),
        ("in '#block187': no\n", "in '#blockN': no\n"),
        ("/tmp/x/disk\n", "FOLDER/disk\n"),
        ("    (0.00/100%)\r    (7.10/100%)\r    (100.00/100%)\r\n", "    (0.00/100%)\r    (100.00/100%)\r\n"),
    ] {
        assert_eq!(mask(line, "/tmp/x"), masked);
    }
}

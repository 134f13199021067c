//! A model card's section about an archive: what was packed, how small it is, what it lost, and how it was made. Everything on
//! it is read from the archive, so whoever has the archive has its card.

use std::fmt::Write;

use crate::archive::Archive;
use crate::hexadecimal::hex;

/// The card, in Markdown.
pub fn card(archive: &Archive) -> String {
    let index = archive.index();
    let of = |key: &str| index.provenance.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str());
    let parameters = archive.parameters();
    let decoded_bytes: u64 = archive.files().iter().map(|file| file.length_bytes).sum();
    let stored_bytes = archive.stored_bytes();
    let mut card = String::from("## Compressed weights\n\n| | |\n|---|---|\n");
    let mut row = |name: &str, value: String| {
        writeln!(card, "| {name} | {} |", printable(&value)).expect("a String takes all that is written to it");
    };
    for file in archive.files() {
        row("packed", format!("`{}`, {} bytes, SHA-256 `{}`", file.name, file.length_bytes, hex(&file.source_sha256)));
    }
    row(
        "archive",
        format!(
            "{stored_bytes} bytes ({:.1} % of the original), {:.3} bits per parameter, content id `{}`",
            100.0 * stored_bytes as f64 / decoded_bytes.max(1) as f64,
            8.0 * stored_bytes as f64 / parameters.max(1) as f64,
            hex(&index.content_id)
        ),
    );
    row(
        "decoded weights",
        match (archive.is_lossy(), of("measured")) {
            (false, _) => "every byte the original's".to_owned(),
            (true, Some(measured)) => format!("lossy, {measured}"),
            (true, None) => "lossy".to_owned(),
        },
    );
    for (key, name) in [("calibration", "calibrated with"), ("evaluation", "evaluated with")] {
        if let Some(value) = of(key) {
            row(name, value.to_owned());
        }
    }
    for base in &index.bases {
        row("needs the base", format!("{}, content id `{}`", base.name, hex(&base.content_id)));
    }
    let base = if index.bases.is_empty() { "" } else { " --base BASE" };
    let calibration = of("calibration").map_or("", |calibration| match calibration.starts_with("built-in") {
        true => " --calibrate",
        false => " --calibration FILE",
    });
    let tool = of("tool").unwrap_or("mcwc-pack");
    row("made with", format!("{tool}: `mcwc-pack CHECKPOINT OUT{base}{calibration} {}`", of("options").unwrap_or("")));
    row("read with", "`mcwcfs mount`, or as real files again after `mcwcfs unpack`".to_owned());
    card
}

/// Names and values may come from anywhere: none ends its cell, its code or its line.
fn printable(value: &str) -> String {
    let escaped = |character: char| match character {
        '|' => "\\|".to_owned(),
        control if control.is_control() => control.escape_default().to_string(),
        other => other.to_string(),
    };
    value.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_stays_in_its_cell() {
        assert_eq!(printable("a|b\n| c"), "a\\|b\\n\\| c");
    }
}

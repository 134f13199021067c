//! Every crate that is linked in comes from crates.io under a licence that suits MIT or Apache-2.0.
//!
//! `.deny.toml` says the same for cargo-deny, which takes longer to build than this crate and so is optional: change
//! both together.

use std::process::Command;

const ALLOWED: &[&str] = &["Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unicode-3.0", "Zlib"];
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[test]
fn every_dependency_comes_from_crates_io_under_an_allowed_licence() {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", &platform];
    let output = Command::new(cargo).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let output = output.expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages of cargo metadata");
    assert!(packages.len() > 10, "cargo metadata lists {} packages", packages.len());

    let mut complaints = Vec::new();
    for package in packages {
        let name =
            format!("{} {}", package["name"].as_str().unwrap_or("?"), package["version"].as_str().unwrap_or("?"));
        match package["source"].as_str() {
            None | Some(CRATES_IO) => {} // none: this crate
            Some(source) => complaints.push(format!("{name}: comes from {source}, not from crates.io")),
        }
        let licence = package["license"].as_str().unwrap_or("none stated");
        if !is_allowed(licence) {
            complaints.push(format!("{name}: licence {licence}, allowed are {ALLOWED:?}"));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn a_licence_expression_needs_one_alternative_of_which_all_parts_are_allowed() {
    for allowed in ["MIT", "GPL-3.0 OR MIT", "MIT/Apache-2.0", "(MIT OR GPL-3.0) AND Unicode-3.0", "ISC AND (MIT)"] {
        assert!(is_allowed(allowed), "{allowed}");
    }
    for refused in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "Apache-2.0 WITH Some-exception", "", "("]
    {
        assert!(!is_allowed(refused), "{refused}");
    }
}

/// Evaluates an SPDX expression, or the older `A/B` for `A OR B`; an exception (`WITH`) is a licence of its own.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut position = 0;
    any_alternative(&words, &mut position) && position == words.len()
}

fn any_alternative(words: &[&str], position: &mut usize) -> bool {
    let mut allowed = all_parts(words, position);
    while words.get(*position) == Some(&"OR") {
        *position += 1;
        allowed |= all_parts(words, position);
    }
    allowed
}

fn all_parts(words: &[&str], position: &mut usize) -> bool {
    let mut allowed = one_part(words, position);
    while words.get(*position) == Some(&"AND") {
        *position += 1;
        allowed &= one_part(words, position);
    }
    allowed
}

fn one_part(words: &[&str], position: &mut usize) -> bool {
    let Some(word) = words.get(*position) else { return false };
    *position += 1;
    if *word == "(" {
        let allowed = any_alternative(words, position);
        *position += 1; // its closing bracket
        return allowed;
    }
    if words.get(*position) == Some(&"WITH") {
        *position += 2;
        return false;
    }
    ALLOWED.contains(word)
}

//! The map in `src/lib.rs` is true: a room uses rooms on floors below its own, and a few crates have one owner.
//!
//! The blank-line separated groups of `pub mod` in `src/lib.rs` are the floors, lowest first. Every path that starts at
//! the crate's root (`crate::room::...`, `use crate::{room, ...}`, or enough `super`s) is a use, in tests too. Comments
//! and strings are not read, so doc links may point anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Crates that exactly one room may name: what they do is that room's business alone.
const OWNERS: &[(&str, &str)] = &[
    ("fuser", "fuse"),
    ("constriction", "codec"),
    ("cudarc", "decode"),
    ("env_logger", "telemetry"),
    ("tiny_http", "telemetry"),
    ("sd_notify", "daemon"),
];

#[test]
fn a_room_uses_only_rooms_on_floors_below_its_own() {
    let floors = floors(&read(&source_root().join("lib.rs")));
    assert!(floors.len() > 5, "src/lib.rs names {} rooms: its groups of `pub mod` were not understood", floors.len());
    let mut complaints = Vec::new();
    for (file, room, depth) in source_files() {
        let tokens = tokens(&read(&source_root().join(&file)));
        complaints.extend(floor_violations(&file, &room, depth, &tokens, &floors));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn a_crate_with_an_owner_is_named_nowhere_else() {
    let mut complaints = Vec::new();
    for (file, room, _) in source_files() {
        complaints.extend(owner_violations(&file, &room, &tokens(&read(&source_root().join(&file)))));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_file_of_the_crate_belongs_to_a_room_on_the_map() {
    let floors = floors(&read(&source_root().join("lib.rs")));
    let rooms: BTreeSet<String> = source_files().into_iter().map(|(_, room, _)| room).collect();
    let lost: Vec<_> = rooms.iter().filter(|room| !floors.contains_key(*room)).collect();
    assert!(lost.is_empty(), "not among the `pub mod` of src/lib.rs: {lost:?}");
}

#[test]
fn groups_of_pub_mod_are_floors_lowest_first() {
    let map = "//! pub mod not_this;\n\npub mod low;\npub mod ground;\n\n/// Docs.\npub mod middle;\n\npub mod top;\n";
    let expected = [("ground", 1), ("low", 1), ("middle", 2), ("top", 3)];
    assert_eq!(floors(map), expected.map(|(room, floor)| (room.to_owned(), floor)).into());
}

#[test]
fn a_use_of_the_same_floor_or_above_is_a_violation() {
    for text in [
        "use crate::pack::Options;",
        "use crate::{codec, pack::{Options, Report}};",
        "use crate::{\n    codec::{blocks, keyframe},\n    pack,\n};",
        "fn f() { crate::pack::run() }",
        "use super::pack;",
        "mod inner { use super::super::pack; }",
        "pub(in crate::pack) fn f() {}",
    ] {
        assert_eq!(violations_of_vfs(text), ["vfs.rs: vfs uses pack"], "{text}");
    }
    assert_eq!(violations_of_vfs("use crate::daemon::Daemon;"), ["vfs.rs: vfs uses daemon"]);
}

#[test]
fn uses_downwards_within_the_room_or_in_text_are_none() {
    for text in [
        "use crate::codec::blocks;",
        "use crate::{codec, codec::{pack, keyframe}};",
        "use crate::vfs::tree;",
        "//! [`crate::pack`]\n/* use crate::pack; /* nested */ crate::pack */",
        "const HINT: &str = \"crate::pack\"; const RAW: &str = r#\"\"crate::pack\"\"#;",
        "const QUOTE: char = '\"'; fn f<'a>(x: &'a str) -> &'a str { x } const OTHER: &str = \"crate::pack\";",
        "mod inner { use super::pack; }", // the room's own `pack`
        "use self::pack;",
        "use other::crate_pack;",
    ] {
        assert_eq!(violations_of_vfs(text), [""; 0], "{text}");
    }
}

#[test]
fn supers_are_counted_from_the_depth_of_the_file() {
    let floors = floors(MADE_UP_MAP);
    let at = |depth, text| floor_violations(Path::new("vfs/tree.rs"), "vfs", depth, &tokens(text), &floors);
    assert_eq!(at(2, "use super::pack;"), [""; 0]);
    assert_eq!(at(2, "use super::super::pack;"), ["vfs/tree.rs: vfs uses pack"]);
}

#[test]
fn an_owned_crate_in_another_room_is_a_violation() {
    let check = |room, text| owner_violations(Path::new("file.rs"), room, &tokens(text));
    assert_eq!(check("vfs", "use fuser::FileType;"), ["file.rs: vfs uses fuser, which is for fuse alone"]);
    assert_eq!(check("fuse", "use fuser::FileType;"), [""; 0]);
    assert_eq!(check("vfs", "let fuser = 1; // fuser::FileType"), [""; 0]);
}

const MADE_UP_MAP: &str = "pub mod codec;\n\npub mod pack;\npub mod vfs;\n\npub mod daemon;\n";

fn violations_of_vfs(text: &str) -> Vec<String> {
    floor_violations(Path::new("vfs.rs"), "vfs", 1, &tokens(text), &floors(MADE_UP_MAP))
}

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file of a room, relative to `src`, with its room and the depth of its module: 1 for `room.rs`, 2 for
/// `room/part.rs`. The map itself and the binaries belong to no room.
fn source_files() -> Vec<(PathBuf, String, usize)> {
    let root = source_root();
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path.strip_prefix(&root).expect("found below src").to_path_buf());
            }
        }
    }
    files.sort();
    let of_a_room = |file: &PathBuf| file != Path::new("lib.rs") && !file.starts_with("bin");
    let described = files.into_iter().filter(of_a_room).map(|file| {
        let module = file.with_extension("");
        let room = module.iter().next().expect("a file has a name").to_string_lossy().into_owned();
        let depth = module.iter().count() - usize::from(module.ends_with("mod"));
        (file, room, depth)
    });
    described.collect()
}

/// Room to floor, 1 the lowest.
fn floors(map: &str) -> BTreeMap<String, usize> {
    let (mut floors, mut floor, mut group_is_open) = (BTreeMap::new(), 0, false);
    for line in map.lines().map(str::trim) {
        if line.is_empty() {
            group_is_open = false;
        } else if let Some(room) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) {
            floor += usize::from(!group_is_open);
            group_is_open = true;
            floors.insert(room.to_owned(), floor);
        }
    }
    floors
}

fn floor_violations(
    file: &Path,
    room: &str,
    depth: usize,
    tokens: &[String],
    floors: &BTreeMap<String, usize>,
) -> Vec<String> {
    let used = rooms_used(tokens, depth);
    let wrong = used.iter().filter(|used| *used != room && floors.get(*used) >= floors.get(room));
    wrong
        .filter(|used| floors.contains_key(*used))
        .map(|used| format!("{}: {room} uses {used}", file.display()))
        .collect()
}

fn owner_violations(file: &Path, room: &str, tokens: &[String]) -> Vec<String> {
    let names = |owned: &str| tokens.windows(2).any(|pair| pair[0] == owned && pair[1] == "::");
    let wrong = OWNERS.iter().filter(|(owned, owner)| *owner != room && names(owned));
    wrong.map(|(owned, owner)| format!("{}: {room} uses {owned}, which is for {owner} alone", file.display())).collect()
}

/// What is named directly under the crate's root by a file whose module lies `depth` below it.
fn rooms_used(tokens: &[String], depth: usize) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    let mut braces: Vec<bool> = Vec::new(); // whether each open brace is that of an inline module
    let mut index = 0;
    while index < tokens.len() {
        match tokens[index].as_str() {
            "{" => braces.push(index >= 2 && tokens[index - 2] == "mod"),
            "}" => drop(braces.pop()),
            "crate" => names_after(tokens, index, &mut used),
            "super" => {
                let mut supers = 1;
                while tokens.get(index + 1).is_some_and(|token| token == "::")
                    && tokens.get(index + 2).is_some_and(|token| token == "super")
                {
                    supers += 1;
                    index += 2;
                }
                if supers == depth + braces.iter().filter(|inline_module| **inline_module).count() {
                    names_after(tokens, index, &mut used);
                }
            }
            _ => {}
        }
        index += 1;
    }
    used
}

/// Collects `a` of `::a...`, and `a` and `b` of `::{a::{...}, b as c}`, after the token at `index`.
fn names_after(tokens: &[String], index: usize, names: &mut BTreeSet<String>) {
    if tokens.get(index + 1).is_none_or(|token| token != "::") {
        return;
    }
    if tokens.get(index + 2).is_none_or(|token| token != "{") {
        names.extend(tokens.get(index + 2).cloned());
        return;
    }
    let (mut depth, mut at_start) = (0, true);
    for token in &tokens[index + 2..] {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => at_start = depth == 1,
            name => {
                if depth == 1 && at_start {
                    names.insert(name.to_owned());
                }
                at_start = false;
            }
        }
        if depth == 0 {
            return;
        }
    }
}

/// Words, `::` and single other characters of Rust source, without comments, strings and character literals.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment_length(rest)
        } else if first == '"' {
            string_length(rest)
        } else if let Some(length) = raw_string_length(rest) {
            length
        } else if first == '\'' {
            character_length(rest)
        } else if first.is_alphanumeric() || first == '_' {
            let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..length].to_owned());
            length
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

/// Block comments nest in Rust.
fn block_comment_length(text: &str) -> usize {
    let (mut depth, mut position) = (0, 0);
    while position < text.len() {
        let (step, change) = match &text.as_bytes()[position..] {
            [b'/', b'*', ..] => (2, 1),
            [b'*', b'/', ..] => (2, -1),
            _ => (1, 0),
        };
        position += step;
        depth += change;
        if depth == 0 {
            break;
        }
    }
    position
}

fn string_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut position = 1;
    while position < bytes.len() && bytes[position] != b'"' {
        position += if bytes[position] == b'\\' { 2 } else { 1 };
    }
    (position + 1).min(bytes.len())
}

/// `r"..."`, `br#"..."#` and so on; `None` where no raw string starts.
fn raw_string_length(text: &str) -> Option<usize> {
    let after_prefix = ["br", "cr", "r"].iter().find_map(|prefix| text.strip_prefix(prefix))?;
    let opened = after_prefix.trim_start_matches('#');
    let hashes = after_prefix.len() - opened.len();
    let content = opened.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = content.find(&end).map_or(content.len(), |found| found + end.len());
    Some(text.len() - content.len() + length)
}

/// A character literal as a whole, or only the quote of a lifetime.
fn character_length(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => text[2..].char_indices().skip(1).find(|(_, c)| *c == '\'').map_or(1, |(at, _)| 2 + at + 1),
        Some(_) => characters.next().filter(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 1),
        None => 1,
    }
}

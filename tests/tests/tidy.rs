//! The rules of the house, held by a test: sizes, imports of the pure cores, clocks and randomness, loose ends.

use tests::source::{Source, rust_files};

/// Files and functions a reader can hold in mind.
const MOST_FILE_LINES: usize = 500;
const MOST_FUNCTION_LINES: usize = 70;
const MOST_LINE_CHARACTERS: usize = 120;

/// What the pure cores may not touch: clocks, randomness, I/O, tasks, logging, hash order, and other rooms' drivers.
const FORBIDDEN_IN_MACHINES: &[&str] = &[
    "Instant",
    "SystemTime",
    "tokio",
    "tonic",
    "object_store",
    "tracing",
    "std::fs",
    "std::net",
    "std::io",
    "std::thread",
    "HashMap",
    "HashSet",
    "Uuid::new",
    "async ",
    "println!",
    "crate::driver",
    "crate::journal",
    "crate::service",
    "getrandom",
];

/// The edges that may read a clock. Everything else is told the time.
const CLOCKS: [&str; 13] = [
    "cli/src/",
    "agent/src/",
    "coordinator/src/",
    "checkpoint-store/src/",
    "worker/src/collective/",
    "worker/src/session/",
    "worker/src/capture.rs",
    "worker/src/generation.rs",
    "worker/src/trainer.rs",
    "worker/src/bench",
    "worker/src/device/cpu/train.rs",
    "worker/src/device/cuda/real/",
    "worker/examples/",
];

/// What asks for the date: a certificate is valid from a day to another, and nodes' clocks are compared.
const DATES: [&str; 2] = ["proto/src/tls/", "proto/src/date.rs"];

/// The one place outside the drivers that draws random numbers: nonces of the ring's handshake.
const RANDOMNESS: &str = "worker/src/collective/tcp/handshake.rs";

fn complain(problems: Vec<String>) {
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn files_functions_and_lines_are_short() {
    let mut problems = Vec::new();
    for file in rust_files() {
        let lines = file.text.lines().count();
        if lines > MOST_FILE_LINES {
            problems.push(format!("{}: {lines} lines, more than {MOST_FILE_LINES}: split it", file.path));
        }
        for (number, line) in file.text.lines().enumerate() {
            let length = line.chars().count();
            if length > MOST_LINE_CHARACTERS && !line.contains("http") {
                problems.push(format!("{}:{}: {length} characters", file.path, number + 1));
            }
        }
        for (name, line, length) in functions(&file) {
            if length > MOST_FUNCTION_LINES {
                problems.push(format!("{}:{line}: fn {name} has {length} lines", file.path));
            }
        }
    }
    complain(problems);
}

/// Name, first line and length of each function, by rustfmt's indentation: a function ends at the closing brace that
/// stands where it began.
fn functions(file: &Source) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = file.text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let words = [
            "pub ",
            "pub(crate) ",
            "pub(super) ",
            "const ",
            "async ",
            "println!",
            "crate::driver",
            "crate::journal",
            "crate::service",
            "getrandom",
            "unsafe ",
        ];
        let mut rest = code;
        while let Some(word) = words.iter().find(|word| rest.starts_with(**word)) {
            rest = &rest[word.len()..];
        }
        let Some(rest) = rest.strip_prefix("fn ") else { continue };
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let close = format!("{}}}", " ".repeat(indent));
        // A line further out than the function itself: it was only named there, in a macro.
        let inside = |line: &&&str| line.is_empty() || line.len() - line.trim_start().len() >= indent;
        let end = lines[index..].iter().take_while(inside).position(|line| **line == close);
        let one_line = line.ends_with('}') || line.ends_with(';');
        // Only declared: its parameters end where it began, and with them all of it.
        let parameters = format!("{})", " ".repeat(indent));
        let declared = lines[index..].iter().find(|line| line.starts_with(&parameters));
        let bodiless = one_line || declared.is_some_and(|line| line.ends_with(';'));
        if let (Some(length), false) = (end, bodiless) {
            found.push((name, index + 1, length + 1));
        }
    }
    found
}

#[test]
fn machines_are_pure() {
    let mut problems = Vec::new();
    for file in rust_files().iter().filter(|file| file.path.contains("/src/machine") && !file.is_test()) {
        for (number, line) in file.product_lines() {
            let code = line.split("//").next().unwrap_or("");
            for word in FORBIDDEN_IN_MACHINES.iter().filter(|word| code.contains(**word)) {
                problems.push(format!("{}:{number}: a pure machine uses {word:?}", file.path));
            }
        }
    }
    complain(problems);
}

#[test]
fn only_edges_read_clocks_and_nobody_asks_for_the_date() {
    let mut problems = Vec::new();
    for file in rust_files().iter().filter(|file| !file.is_test()) {
        let edge = CLOCKS.iter().any(|place| file.path.starts_with(place));
        for (number, line) in file.product_lines() {
            let code = line.split("//").next().unwrap_or("");
            let random = code.contains("thread_rng") || code.contains("rand::");
            let date = ["SystemTime", "UnixTime::now", "now_utc"].iter().any(|word| code.contains(word));
            let may_ask = DATES.iter().any(|place| file.path.starts_with(place));
            if (date && !may_ask) || (random && file.path != RANDOMNESS) {
                problems.push(format!("{}:{number}: wall clock or ambient randomness", file.path));
            }
            if !edge && code.contains("Instant::now") {
                problems.push(format!("{}:{number}: a clock outside the edges", file.path));
            }
        }
    }
    complain(problems);
}

#[test]
fn nothing_is_left_loose() {
    let mut problems = Vec::new();
    // Put together here so that this file does not find itself.
    let loose =
        ["TO".to_string() + "DO", "FIX".to_string() + "ME", "todo".to_string() + "!(", "dbg".to_string() + "!("];
    let loose = [&loose[..], &["unimplemented".to_string() + "!(", "#[igno".to_string() + "re"]].concat();
    for file in rust_files() {
        for (number, line) in file.text.lines().enumerate() {
            for word in loose.iter().filter(|word| line.contains(word.as_str())) {
                problems.push(format!("{}:{}: {word}", file.path, number + 1));
            }
        }
        if !file.text.starts_with("//!") && !file.path.ends_with("build.rs") {
            problems.push(format!("{}: no module header", file.path));
        }
    }
    complain(problems);
}

#[test]
fn rooms_import_only_whom_they_may() {
    let allowed: [(&str, &[&str]); 5] = [
        ("proto/src/", &[]),
        ("checkpoint-store/src/", &["proto"]),
        ("worker/src/", &["proto", "checkpoint_store"]),
        ("agent/src/", &["proto", "checkpoint_store"]),
        ("coordinator/src/", &["proto", "checkpoint_store"]),
    ];
    let rooms = ["proto", "checkpoint_store", "worker", "agent", "coordinator"];
    let mut problems = Vec::new();
    for file in rust_files() {
        let Some((_, allowed)) = allowed.iter().find(|(room, _)| file.path.starts_with(room)) else { continue };
        for (number, line) in file.product_lines() {
            let imported = line.trim_start().strip_prefix("use ").unwrap_or("");
            let imported = imported.split("::").next().unwrap_or("");
            if rooms.contains(&imported) && !allowed.contains(&imported) {
                problems.push(format!("{}:{number}: imports {imported}", file.path));
            }
        }
    }
    complain(problems);
}

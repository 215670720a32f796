//! The tree's own rules, checked by reading it.

use std::path::Path;
use std::process::Command;

/// Longest source file: beyond it there is a second story.
const MOST_LINES: usize = 1000;

/// Checks them all.
pub(crate) fn check(root: &Path) -> Result<(), String> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("git ls-files: {error}"))?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut faults = Vec::new();
    let mut sources = 0;
    for name in listing.split('\0').filter(|name| !name.is_empty()) {
        let Ok(text) = std::fs::read_to_string(root.join(name)) else {
            continue;
        };
        if name.ends_with(".rs") {
            sources += 1;
            source(name, &text, &mut faults);
        }
    }
    if sources < 50 {
        faults.push(format!("only {sources} source files were seen"));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

fn source(name: &str, text: &str, faults: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MOST_LINES {
        faults.push(format!(
            "{name}: {lines} lines; look for the second story in it"
        ));
    }
    // This file names what it looks for.
    if name.starts_with("xtask/") {
        return;
    }
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("").trim();
        let mut fault = |what: &str| faults.push(format!("{name}:{}: {what}", index + 1));
        // The product's own code. An example that plays a VMM has guest memory, a test its counting allocator.
        let product = name.contains("/src/") && !name.starts_with("crates/ring/");
        if product
            && ["unsafe {", "unsafe fn", "unsafe impl"]
                .iter()
                .any(|word| code.contains(word))
        {
            fault("unsafe code belongs into crates/ring");
        }
        if code.contains("todo!(") || code.contains("unimplemented!(") {
            fault("unfinished code");
        }
        if code.starts_with("#[ignore") {
            fault("an ignored test: a test runs or it is not there");
        }
        let engine = name.starts_with("crates/engine/src/") && name != "crates/engine/src/sync.rs";
        if engine && code.contains("std::sync::") {
            fault("the engine names locks and atomics in sync.rs only");
        }
    }
}

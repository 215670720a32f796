//! The tree's own rules, checked by reading it. Files that Git does not know yet count too.

use std::path::Path;
use std::process::Command;

use crate::survivors;

/// Longest source file: beyond it there is a second story.
const MOST_LINES: usize = 1000;

/// Checks them all.
pub(crate) fn check(root: &Path) -> Result<(), String> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
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
        machine_paths(name, &text, &mut faults);
        if name.ends_with(".rs") {
            sources += 1;
            source(name, &text, &mut faults);
        }
    }
    survivors::check(root, &mut faults);
    if sources < 50 {
        faults.push(format!("only {sources} source files were seen"));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

/// Where developers' checkouts and homes lie: nothing that another machine has.
fn machine_paths(name: &str, text: &str, faults: &mut Vec<String>) {
    // This file names what it looks for.
    if name == "xtask/src/tidy.rs" {
        return;
    }
    for (index, line) in text.lines().enumerate() {
        if ["/work/", "/home/", "/Users/"]
            .iter()
            .any(|path| line.contains(path))
        {
            faults.push(format!("{name}:{}: a path of one machine", index + 1));
        }
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

#[cfg(test)]
mod tests {
    //! Guards against a check that finds nothing because it looks at nothing.

    fn faults(name: &str, text: &str) -> usize {
        let mut faults = Vec::new();
        super::machine_paths(name, text, &mut faults);
        super::source(name, text, &mut faults);
        faults.len()
    }

    #[test]
    fn each_rule_finds_its_offender() {
        let engine = "crates/engine/src/a.rs";
        assert_eq!(faults(engine, "fn a() {}\n"), 0);
        assert_eq!(faults(engine, &"// x\n".repeat(super::MOST_LINES + 1)), 1);
        assert_eq!(faults(engine, "unsafe { a() }\n"), 1);
        assert_eq!(faults("crates/ring/src/a.rs", "unsafe { a() }\n"), 0);
        assert_eq!(faults(engine, "// unsafe { a() }\n"), 0);
        assert_eq!(faults(engine, "todo!()\n"), 1);
        assert_eq!(faults("tests/a.rs", "#[ignore = \"slow\"]\n"), 1);
        assert_eq!(faults(engine, "use std::sync::Arc;\n"), 1);
        assert_eq!(
            faults("crates/engine/src/sync.rs", "use std::sync::Arc;\n"),
            0
        );
        assert_eq!(faults(engine, "// see /home/me/urus\n"), 1);
    }
}

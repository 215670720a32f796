//! Licences and sources of every dependency, from cargo's own metadata: works offline. Where cargo-deny is installed,
//! it is asked too (it also knows advisories).

use std::path::Path;
use std::process::Command;

use serde_json::Value;

const ALLOWED: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unicode-3.0",
    "CC0-1.0",
    "Unlicense",
];

/// How cargo names its own registry.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks all of them.
pub(crate) fn check(root: &Path) -> Result<(), String> {
    let output = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cargo metadata: {error}"))?;
    let packages = metadata["packages"]
        .as_array()
        .ok_or("cargo metadata lists no packages")?;
    let mut faults = Vec::new();
    for package in packages {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or("?"),
            package["version"].as_str().unwrap_or("?")
        );
        let licence = package["license"].as_str().unwrap_or("");
        if !allows(licence) {
            faults.push(format!("{name}: licence `{licence}` is not on the list"));
        }
        // Members of the workspace have no source.
        if let Some(source) = package["source"].as_str()
            && !source.starts_with(CRATES_IO)
        {
            faults.push(format!("{name}: comes from {source}"));
        }
    }
    if packages.len() < 10 {
        faults.push(format!("only {} packages were seen", packages.len()));
    }
    if !faults.is_empty() {
        return Err(faults.join("\n"));
    }
    println!(
        "{} packages, all permissive, all from crates.io",
        packages.len()
    );
    if Command::new("cargo")
        .args(["deny", "--version"])
        .output()
        .is_ok_and(|found| found.status.success())
    {
        let status = Command::new("cargo")
            .args(["deny", "--offline", "check", "licenses", "bans", "sources"])
            .current_dir(root)
            .status()
            .map_err(|error| format!("cargo deny: {error}"))?;
        if !status.success() {
            return Err(format!("cargo deny ended with {status}"));
        }
    }
    Ok(())
}

/// Whether one way of choosing satisfies an SPDX expression of ORs and ANDs (the old `/` means OR).
fn allows(expression: &str) -> bool {
    let expression = expression.replace(['(', ')'], " ").replace('/', " OR ");
    // AND binds tighter; parentheses around ORs inside ANDs do not occur among our dependencies in a way that matters.
    !expression.trim().is_empty()
        && expression.split(" OR ").any(|choice| {
            choice
                .split(" AND ")
                .all(|licence| ALLOWED.contains(&licence.trim()))
        })
}

#[cfg(test)]
mod tests {
    use super::allows;

    /// Guards against an expression that is let through because a part of it is allowed.
    #[test]
    fn judges_expressions() {
        assert!(allows("MIT OR Apache-2.0"));
        assert!(allows("MIT/Apache-2.0"));
        assert!(allows("GPL-2.0 OR MIT"));
        assert!(allows("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(!allows("MIT AND GPL-2.0"));
        assert!(!allows("GPL-3.0-only"));
        assert!(!allows(""));
    }
}

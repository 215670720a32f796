//! Licences and sources of every dependency, from cargo's own metadata: works offline. Where cargo-deny is installed,
//! it is asked too (it also knows advisories).

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::spdx;

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
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or("?"),
            package["version"].as_str().unwrap_or("?")
        );
        let licence = package["license"].as_str().unwrap_or("");
        match spdx::is_allowed(licence, ALLOWED) {
            Ok(true) => {}
            Ok(false) => faults.push(format!("{name}: licence `{licence}` is not on the list")),
            Err(why) => faults.push(format!("{name}: {why}")),
        }
        let crate_name = package["name"].as_str().unwrap_or("?");
        versions
            .entry(crate_name)
            .or_default()
            .push(package["version"].as_str().unwrap_or("?"));
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
    // No fault, but weight: worth knowing when a dependency is added.
    for (name, versions) in versions.iter().filter(|(_, versions)| versions.len() > 1) {
        println!(
            "{name} comes in {} versions: {}",
            versions.len(),
            versions.join(", ")
        );
    }
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
    } else {
        println!("advisories: not checked, cargo-deny is not installed");
    }
    Ok(())
}

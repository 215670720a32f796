//! Which error branches of the engine are ever taken, while the simulator injects errors: by the compiler's own coverage, so the
//! engine knows nothing of it.
//!
//! An error branch is a `?` (also one on an `Option`: the text does not tell) or an expression that begins with `Err(`. A check runs
//! without injected errors, so its branches are not counted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::steps::{Steps, output};

const SOURCES: &str = "crates/engine/src/";
const WITHOUT: &str = "crates/engine/src/check/";
/// Of each workload's errors: with few of them, a minute comes to all configurations, and to many workloads of each.
const INJECTIONS: &str = "6";

/// LLVM's programs, of a version that reads what this compiler writes.
struct Tools {
    profdata: String,
    cov: String,
}

impl Tools {
    fn find() -> Option<Self> {
        let compiler = output(Command::new("rustc").arg("-vV")).ok()?;
        let wanted = version(&compiler)?;
        let tool = |name: &str| {
            [format!("{name}-{wanted}"), name.to_owned()]
                .into_iter()
                .find(|name| {
                    let said = output(Command::new(name).arg("--version")).unwrap_or_default();
                    version(&said).is_some_and(|found| found >= wanted)
                })
        };
        Some(Self {
            profdata: tool("llvm-profdata")?,
            cov: tool("llvm-cov")?,
        })
    }
}

/// The number behind "LLVM version", with or without a colon.
fn version(said: &str) -> Option<u32> {
    let (_, rest) = said.split_once("LLVM version")?;
    let number = rest.trim_start_matches([':', ' ']);
    number.split('.').next()?.trim().parse().ok()
}

/// File, line and column.
type Place = (String, usize, usize);

/// Builds the simulator with counters, injects errors for so many minutes, and tells what was taken.
pub(crate) fn run(steps: &mut Steps, minutes: u64, seed: u64) {
    let Some(tools) = Tools::find() else {
        steps.note(
            "branches",
            "not run: it needs llvm-profdata and llvm-cov as new as the compiler's LLVM (Debian: llvm-22)",
        );
        return;
    };
    let directory = steps.target_directory().join("branches");
    let mut build = steps.cargo_command(&["build", "--locked", "--profile", "mutants"]);
    build
        .args(["-p", "urus-sim", "--bin", "urus-sim"])
        .env("RUSTFLAGS", "-C instrument-coverage")
        .env("CARGO_TARGET_DIR", &directory)
        // Build scripts are built with counters, too.
        .env("LLVM_PROFILE_FILE", directory.join("built-%p.profraw"));
    steps.run("build with counters", build);
    if steps.failed() {
        return;
    }
    steps.check("branches", |root| {
        let directory = root.join(directory);
        let taken = count(root, &directory, &tools, minutes, seed)?;
        tell(&directory, &taken, seed)
    });
}

fn count(
    root: &Path,
    directory: &Path,
    tools: &Tools,
    minutes: u64,
    seed: u64,
) -> Result<BTreeMap<Place, u64>, String> {
    let program = directory.join("mutants").join("urus-sim");
    let (raw, merged) = (
        directory.join("all.profraw"),
        directory.join("all.profdata"),
    );
    let said = output(
        Command::new(&program)
            .args(["--part", "errors", "--qemu", "0"])
            .args(["--injections", INJECTIONS])
            .args(["--minutes", &minutes.to_string()])
            .args(["--seed", &seed.to_string()])
            .env("LLVM_PROFILE_FILE", &raw),
    )?;
    println!("{said}");
    output(
        Command::new(&tools.profdata)
            .args(["merge", "-sparse"])
            .arg(&raw)
            .arg("-o")
            .arg(&merged),
    )?;
    let mut profile = std::ffi::OsString::from("-instr-profile=");
    profile.push(&merged);
    let exported = output(
        Command::new(&tools.cov)
            .arg("export")
            .arg(&program)
            .arg(profile)
            .arg("--sources")
            .arg(root.join(SOURCES)),
    )?;
    let exported: Value =
        serde_json::from_str(&exported).map_err(|error| format!("llvm-cov export: {error}"))?;
    let mut sources: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut taken = BTreeMap::new();
    let functions = exported["data"][0]["functions"].as_array();
    for function in functions.into_iter().flatten() {
        for region in function["regions"].as_array().into_iter().flatten() {
            let Some((file, numbers)) = region_of(function, region) else {
                continue;
            };
            let file = Path::new(file);
            let Ok(name) = file.strip_prefix(root) else {
                continue;
            };
            let name = name.to_string_lossy().into_owned();
            if !name.starts_with(SOURCES) || name.starts_with(WITHOUT) {
                continue;
            }
            let source = match sources.get(file) {
                Some(source) => source,
                None => {
                    let text = fs::read_to_string(file)
                        .map_err(|error| format!("{}: {error}", file.display()))?;
                    sources.entry(file.to_owned()).or_insert(text)
                }
            };
            let [line, column, last_line, last_column, count] = numbers;
            if is_error(source, (line, column), (last_line, last_column)) {
                *taken.entry((name, line, column)).or_insert(0) += count as u64;
            }
        }
    }
    Ok(taken)
}

/// The file of a region of code, and its place and count.
fn region_of<'a>(function: &'a Value, region: &Value) -> Option<(&'a str, [usize; 5])> {
    let number = |at: usize| usize::try_from(region[at].as_u64()?).ok();
    // Code, and no gap between two pieces of it.
    if number(7)? != 0 {
        return None;
    }
    let file = function["filenames"][number(5)?].as_str()?;
    let place = [number(0)?, number(1)?, number(2)?, number(3)?, number(4)?];
    Some((file, place))
}

/// Whether the text from one place up to another is an error branch. Columns count bytes, from 1.
fn is_error(source: &str, start: (usize, usize), end: (usize, usize)) -> bool {
    let Some(line) = source.lines().nth(start.0 - 1) else {
        return false;
    };
    let rest = line.get(start.1 - 1..).unwrap_or("");
    let is_mark = start.0 == end.0 && end.1 == start.1 + 1 && rest.starts_with('?');
    is_mark || rest.starts_with("Err(") || rest.starts_with("return Err(")
}

fn tell(directory: &Path, taken: &BTreeMap<Place, u64>, seed: u64) -> Result<(), String> {
    if taken.is_empty() {
        return Err("no branch was counted".into());
    }
    let mut files: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    let mut never = String::new();
    for ((file, line, column), count) in taken {
        let (all, some) = files.entry(file).or_default();
        *all += 1;
        *some += u64::from(*count > 0);
        if *count == 0 {
            never.push_str(&format!("{file}:{line}:{column}\n"));
        }
    }
    let path = directory.join("never.txt");
    fs::write(&path, never).map_err(|error| format!("{}: {error}", path.display()))?;
    println!(
        "{:<36} {:>9} {:>7} {:>6}",
        "error branches", "of", "taken", "seed"
    );
    for (file, (all, some)) in &files {
        println!("  {file:<34} {all:>9} {some:>7}");
    }
    let some = files.values().map(|(_, some)| some).sum::<u64>();
    println!("{:<36} {:>9} {some:>7} {seed:>6}", "branches", taken.len());
    println!("the others: {}", path.display());
    if some == 0 {
        return Err("no error branch was ever taken".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Guards against a share of branches that are none.

    use super::*;

    #[test]
    fn error_branches_are_told_from_others() {
        let source = "let a = b()?;\nErr(Error::Closed)\nok(1)\n";
        assert!(is_error(source, (1, 12), (1, 13)));
        assert!(!is_error(source, (1, 9), (1, 13)));
        assert!(is_error(source, (2, 1), (2, 19)));
        assert!(!is_error(source, (3, 1), (3, 6)));
        assert!(!is_error(source, (9, 1), (9, 6)));
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("host: x\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(version("Debian LLVM version 14.0.6\n"), Some(14));
        assert_eq!(version("nothing"), None);
    }
}

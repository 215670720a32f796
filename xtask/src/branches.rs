//! Which error branches of the engine are ever taken, while the simulator injects errors: by the compiler's own coverage, so the
//! engine knows nothing of it.
//!
//! An error branch is a `?` or an expression that begins with `Err(`. Those that no failing operation can lead to are told by their text
//! and counted apart: a `?` on an `Option`, and what refuses a damaged image or a request that cannot be met. A check runs without
//! injected errors, so its branches are not counted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::steps::{Steps, output};

const SOURCES: &str = "crates/engine/src/";
/// A check runs without injected errors; the other is for benches and tests.
const WITHOUT: [&str; 2] = ["crates/engine/src/check/", "crates/engine/src/parts.rs"];
/// Of each workload's errors, those first that go to places where few have gone: with some of them, a minute comes to all configurations.
const INJECTIONS: &str = "10";

/// Counters slow everything down.
const OPTIMISED: [&str; 3] = [
    "profile.mutants.package.urus-sim.opt-level=3",
    "profile.mutants.package.urus-engine.opt-level=3",
    "profile.mutants.package.urus-format.opt-level=3",
];

/// Of a hundred branches that a failing operation can lead to, so many must be taken.
const LEAST_TAKEN_PERCENT: u64 = 80;

/// Errors that say something of the image or of the request, and not of an operation.
const REFUSALS: [&str; 11] = [
    "Error::BadEntry",
    "Error::Closed",
    "Error::Corrupt",
    "Error::Decompress",
    "Error::Format",
    "Error::OutOfRange",
    "Error::ReadOnly",
    "Error::Unsupported",
    "format_error",
    "NoCleanFrame",
    // Of the process, and not of the storage.
    "reserved.map_err(",
];

/// What gives only such errors, or an `Option`. All else that ends with a `?` is taken for something that an operation can make fail.
/// Or what fails by memory of the process itself, by an end that was asked for, or by a planted bug alone.
const REFUSES: [&str; 23] = [
    "check_not_cut_short(",
    "decrement_early(",
    "patch(",
    "planted::",
    "serialize_writes(",
    "zeroed(",
    "claim(",
    "frames.get(",
    ".get(",
    ".get_mut(",
    "last_mut(",
    "pop_front(",
    "qcow2(",
    "self.slot(",
    "check_l1(",
    "check_range(",
    "check_slice(",
    "check_supported(",
    "l1_entry(",
    "plan_block(",
    "self.apply(",
    "self.install(",
    "self.take_frame(",
];

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

/// An error branch.
struct Branch {
    /// Its line.
    text: String,
    /// Whether a failing operation can lead to it.
    by_storage: bool,
    taken: u64,
}

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
        .args(OPTIMISED.iter().flat_map(|option| ["--config", option]))
        .args([
            "-p",
            "urus-sim",
            "--bin",
            "urus-sim",
            "--features",
            "callers",
        ])
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
) -> Result<BTreeMap<Place, Branch>, String> {
    let program = directory.join("mutants").join("urus-sim");
    let (raw, merged) = (
        directory.join("all.profraw"),
        directory.join("all.profdata"),
    );
    let status = Command::new(&program)
        .args(["--part", "errors", "--qemu", "0"])
        .args(["--injections", INJECTIONS, "--cuts", "0"])
        .args(["--minutes", &minutes.to_string()])
        .args(["--seed", &seed.to_string()])
        .env("LLVM_PROFILE_FILE", &raw)
        .status()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    if !status.success() {
        return Err(format!("the simulator ended with {status}"));
    }
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
            if !name.starts_with(SOURCES) || WITHOUT.iter().any(|path| name.starts_with(path)) {
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
                let new = || Branch {
                    text: source.lines().nth(line - 1).unwrap_or("").trim().to_owned(),
                    by_storage: is_by_storage(source, (line, column)),
                    taken: 0,
                };
                let branch = taken.entry((name, line, column)).or_insert_with(new);
                branch.taken += count as u64;
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
    let (before, rest) = line.split_at_checked(start.1 - 1).unwrap_or((line, ""));
    let is_mark = start.0 == end.0 && end.1 == start.1 + 1 && rest.starts_with('?');
    let is_made = rest.starts_with("Err(") || rest.starts_with("return Err(");
    // A value that stands by is no branch.
    is_mark || is_made && !before.ends_with("unwrap_or(")
}

/// Whether a failing operation can lead to the branch at this place, as far as its text tells.
fn is_by_storage(source: &str, (line, column): (usize, usize)) -> bool {
    let before: usize = source
        .split_inclusive('\n')
        .take(line - 1)
        .map(str::len)
        .sum();
    let (before, rest) = source
        .split_at_checked(before + column - 1)
        .unwrap_or((source, ""));
    let one = |text: &str, names: &[&str]| names.iter().any(|name| text.contains(name));
    if rest.starts_with('?') {
        let expression = expression(before);
        return !one(expression, &REFUSALS) && !one(expression, &REFUSES);
    }
    let made = rest.lines().next().unwrap_or("");
    let pattern = before.lines().last().unwrap_or("");
    // A full queue gives its request back; what stands behind `Bad(error) =>` was found in a table.
    // A text is what a test is told.
    let is_text = made.contains("Err(format!(") || made.contains("Err(\"");
    !one(made, &REFUSALS)
        && !is_text
        && !made.contains("Err(request)")
        && !pattern.contains("Bad(error)")
}

/// The expression that a text ends with: from the last `;`, `,`, brace or `=>` that is not inside it.
fn expression(text: &str) -> &str {
    let mut depth = 0;
    let mut start = text.len();
    for (at, character) in text.char_indices().rev() {
        match character {
            ')' | ']' | '}' => depth += 1,
            '(' | '[' | '{' if depth > 0 => depth -= 1,
            '(' | '[' | '{' | ';' | ',' if depth == 0 => break,
            '>' if depth == 0 && text[..at].ends_with('=') => break,
            _ => {}
        }
        start = at;
    }
    &text[start..]
}

fn tell(directory: &Path, taken: &BTreeMap<Place, Branch>, seed: u64) -> Result<(), String> {
    if taken.is_empty() {
        return Err("no branch was counted".into());
    }
    let mut files: BTreeMap<&str, [u64; 3]> = BTreeMap::new();
    let mut never = [String::new(), String::new()];
    for ((file, line, column), branch) in taken {
        let [all, by_storage, some] = files.entry(file).or_default();
        *all += 1;
        *by_storage += u64::from(branch.by_storage);
        *some += u64::from(branch.by_storage && branch.taken > 0);
        if branch.taken == 0 {
            let text = &branch.text;
            never[usize::from(!branch.by_storage)]
                .push_str(&format!("{file}:{line}:{column}: {text}\n"));
        }
    }
    let [never, others] = never;
    let never = format!("{never}\nNot by a failing operation:\n{others}");
    let path = directory.join("never.txt");
    fs::write(&path, never).map_err(|error| format!("{}: {error}", path.display()))?;
    println!(
        "{:<36} {:>9} {:>10} {:>7} {:>7} {:>6}",
        "error branches", "all", "by storage", "taken", "share/%", "seed"
    );
    for (file, [all, by_storage, some]) in &files {
        println!("  {file:<34} {all:>9} {by_storage:>10} {some:>7}");
    }
    let sum = |at: usize| files.values().map(|counts| counts[at]).sum::<u64>();
    let (by_storage, some) = (sum(1), sum(2));
    println!(
        "{:<36} {:>9} {by_storage:>10} {some:>7} {:>7.1} {seed:>6}",
        "branches",
        taken.len(),
        some as f64 * 100.0 / by_storage.max(1) as f64
    );
    println!("the others: {}", path.display());
    if some == 0 || some * 100 < by_storage * LEAST_TAKEN_PERCENT {
        return Err(format!(
            "fewer than {LEAST_TAKEN_PERCENT} % of the branches that a failing operation can lead to were taken"
        ));
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
        let source = "a.unwrap_or(Err(Error::Closed))\n";
        assert!(!is_error(source, (1, 13), (1, 31)));
    }

    #[test]
    fn refusals_are_told_from_failed_operations() {
        let by_storage = |source: &str, branch: &str| {
            let at = source.find(branch).unwrap();
            let line = source[..at].matches('\n').count() + 1;
            let column = at - source[..at].rfind('\n').map_or(0, |end| end + 1) + 1;
            is_by_storage(source, (line, column))
        };
        for (source, expected) in [
            ("claim(1, 2)?;\nself.flush().await?;", false),
            ("claim(1, 2);\nself.flush().await?;", true),
            ("a(\n b,\n)\n.await?;", true),
            ("let image = shared.layers[0].qcow2()?;", false),
            ("x.map_err(|s| Error::Format {\n file,\n})?;", false),
            ("Miss(s) => self.load(0, s).await?,", true),
            ("l1_entry(0, 1), self.load(0, s).await?,", true),
            ("let mut bytes = zeroed(len)?;", false),
        ] {
            assert_eq!(by_storage(source, "?"), expected, "{source}");
        }
        for (source, expected) in [
            ("return Err(Error::Corrupt {", false),
            ("return Err(Error::Poisoned {", true),
            ("Bad(error) => return Err(*error),", false),
            ("Err(_) => return Err(error),", true),
            ("return Err(request);", false),
            ("return Err(format!(\"wrong\"));", false),
        ] {
            assert_eq!(by_storage(source, "return Err("), expected, "{source}");
        }
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("host: x\nLLVM version: 22.1.2\n"), Some(22));
        assert_eq!(version("Debian LLVM version 14.0.6\n"), Some(14));
        assert_eq!(version("nothing"), None);
    }
}

//! How many instructions a hit takes, as callgrind counts them, held to the figures of `crates/benches/instructions.txt`. Unlike time they
//! are the same in every run, so a path that has grown by a few percent is seen on the busiest machine.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::packages;
use crate::steps::Steps;

const FIGURES: &str = "crates/benches/instructions.txt";
/// What the figures are of: other processors have other instructions.
const ARCHITECTURE: &str = "x86_64";
/// Two runs of each case, whose difference is that of the hits alone: making the disk, and starting, are the same in both.
const FEW: u64 = 4_096;
const MANY: u64 = 36_864;

/// The committed figures.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Figures {
    compiler: String,
    /// How far a figure may be off, up or down.
    drift_percent: u64,
    /// Case, and instructions of each operation.
    cases: Vec<(String, u64)>,
}

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Within,
    Over,
    Under,
}

impl Verdict {
    fn of(measured: u64, figure: u64, drift_percent: u64) -> Self {
        let (measured, allowed) = (u128::from(measured) * 100, u128::from(drift_percent));
        if measured > u128::from(figure) * (100 + allowed) {
            Self::Over
        } else if measured < u128::from(figure) * (100 - allowed.min(100)) {
            Self::Under
        } else {
            Self::Within
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Within => "ok",
            Self::Over => "TOO MANY: find what has grown",
            Self::Under => "fewer: lower the figure (--write), so that it stays so",
        }
    }
}

/// Measures; compares, or writes the figures anew.
pub(crate) fn run(steps: &mut Steps, write: bool) {
    if std::env::consts::ARCH != ARCHITECTURE {
        return steps.note(
            "instructions",
            "not run: the figures are of another architecture",
        );
    }
    steps.check("packages", packages::install);
    steps.cargo(
        "build what is counted",
        &[
            "build",
            "--release",
            "--locked",
            "-p",
            "urus-benches",
            "--bin",
            "hits",
        ],
    );
    if steps.failed() {
        return;
    }
    let target = steps.target_directory();
    steps.check("instructions", |root| {
        let path = root.join(FIGURES);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let figures = parse(&text)?;
        let counted = count_all(&figures, &target)?;
        if write {
            let text = figures.with(&compiler(), &counted).text();
            return std::fs::write(&path, text)
                .map_err(|error| format!("{}: {error}", path.display()));
        }
        compare(&figures, &counted)
    });
}

/// Instructions of each operation, in the order of the figures.
fn count_all(figures: &Figures, target: &Path) -> Result<Vec<u64>, String> {
    let directory = target.join("urus-instructions");
    std::fs::create_dir_all(&directory)
        .map_err(|error| format!("{}: {error}", directory.display()))?;
    let program = target.join("release").join("hits");
    let mut counted = Vec::new();
    for (case, _) in &figures.cases {
        let few = count(&program, case, FEW, &directory)?;
        let many = count(&program, case, MANY, &directory)?;
        if many <= few {
            return Err(format!(
                "{case}: {MANY} hits took {many} instructions, and {FEW} took {few}"
            ));
        }
        counted.push((many - few) / (MANY - FEW));
    }
    Ok(counted)
}

/// One run under callgrind. What it wrote is kept: callgrind_annotate shows where the instructions are.
fn count(program: &Path, case: &str, operations: u64, directory: &Path) -> Result<u64, String> {
    let out = directory.join(format!("{case}-{operations}.callgrind"));
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args([case, &operations.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("valgrind cannot be run: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "{case} ended with {}: {}",
            output.status,
            text.trim()
        ));
    }
    let text =
        std::fs::read_to_string(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    total(&text).ok_or_else(|| format!("{} tells no total", out.display()))
}

/// The sum at the end of what callgrind wrote.
fn total(text: &str) -> Option<u64> {
    let total = text.lines().rev().find_map(|line| {
        line.strip_prefix("totals:")
            .or_else(|| line.strip_prefix("summary:"))
    })?;
    total.trim().parse().ok()
}

fn compare(figures: &Figures, counted: &[u64]) -> Result<(), String> {
    println!(
        "{:<24}{:>12}{:>10}{:>9}  instructions per operation, {} % of drift allowed",
        "case", "instructions", "figure", "change", figures.drift_percent
    );
    let mut wrong = 0;
    for ((case, figure), counted) in figures.cases.iter().zip(counted) {
        let verdict = Verdict::of(*counted, *figure, figures.drift_percent);
        wrong += u32::from(verdict != Verdict::Within);
        println!(
            "{case:<24}{counted:>12}{figure:>10}{:>9}  {}",
            change(*counted, *figure),
            verdict.text()
        );
    }
    if wrong == 0 {
        return Ok(());
    }
    let here = compiler();
    let other = if here == figures.compiler {
        String::new()
    } else {
        format!(
            "; the figures are of {}, and this is {here}",
            figures.compiler
        )
    };
    Err(format!(
        "{wrong} of the figures of {FIGURES} no longer hold{other}"
    ))
}

/// In tenths of a percent, as text.
fn change(counted: u64, figure: u64) -> String {
    let (sign, by) = if counted < figure {
        ('-', figure - counted)
    } else {
        ('+', counted - figure)
    };
    let tenths = by.saturating_mul(1000) / figure.max(1);
    format!("{sign}{}.{} %", tenths / 10, tenths % 10)
}

/// As it calls itself.
fn compiler() -> String {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .arg("--version")
        .output()
        .map_or_else(
            |_| "an unknown compiler".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
}

fn parse(text: &str) -> Result<Figures, String> {
    let mut figures = Figures {
        compiler: String::new(),
        drift_percent: 0,
        cases: Vec::new(),
    };
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = || format!("{FIGURES}: not a name and a number: {line}");
        let (name, value) = line.split_once(' ').ok_or_else(wrong)?;
        if name == "compiler" {
            value.trim().clone_into(&mut figures.compiler);
            continue;
        }
        let number = value.trim().parse().map_err(|_| wrong())?;
        match name {
            "drift_percent" => figures.drift_percent = number,
            _ => figures.cases.push((name.to_owned(), number)),
        }
    }
    if figures.cases.is_empty() || figures.drift_percent == 0 {
        return Err(format!("{FIGURES} has no cases, or allows no drift"));
    }
    Ok(figures)
}

impl Figures {
    fn with(&self, compiler: &str, counted: &[u64]) -> Self {
        let names = self.cases.iter().map(|(name, _)| name.clone());
        Self {
            compiler: compiler.to_owned(),
            drift_percent: self.drift_percent,
            cases: names.zip(counted.iter().copied()).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "# Instructions of one hit, engine only (src/hits.rs). `cargo xtask instructions` compares, with --write it writes this file.\n\
             compiler {}\n\
             # Off by more, up or down, and CI fails.\n\
             drift_percent {}\n",
            self.compiler, self.drift_percent
        );
        for (case, figure) in &self.cases {
            // Writing into a string does not fail.
            let _ = writeln!(text, "{case} {figure}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    //! Guards the gate itself: that it closes, in both directions, and reads what it and callgrind have written.
    use super::*;

    #[test]
    fn a_figure_holds_within_the_drift_only() {
        for (measured, verdict) in [
            (949, Verdict::Under),
            (950, Verdict::Within),
            (1000, Verdict::Within),
            (1050, Verdict::Within),
            (1051, Verdict::Over),
        ] {
            assert_eq!(Verdict::of(measured, 1000, 5), verdict, "{measured}");
        }
        assert_eq!(change(1051, 1000), "+5.1 %");
        assert_eq!(change(950, 1000), "-5.0 %");
    }

    #[test]
    fn one_case_that_has_grown_fails_all() {
        let figures = parse("compiler c\ndrift_percent 5\na 100\nb 200\n").expect("figures");
        assert!(compare(&figures, &[105, 190]).is_ok());
        for counted in [[106, 200], [100, 189]] {
            let error = compare(&figures, &counted).expect_err("one does not hold");
            assert!(error.starts_with("1 of the figures"), "{error}");
        }
    }

    #[test]
    fn figures_are_read_as_they_are_written() {
        let figures = Figures {
            compiler: "rustc 1.0 (of today)".to_owned(),
            drift_percent: 5,
            cases: vec![("read_4k".to_owned(), 321)],
        };
        assert_eq!(parse(&figures.text()), Ok(figures));
        for text in ["", "read_4k 3\n", "drift_percent 5\n", "drift_percent x\n"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn totals_are_those_of_callgrind() {
        let text = "events: Ir\nsummary: 12\n\nfn=(1)\n1 12\n\ntotals: 123456\n";
        assert_eq!(total(text), Some(123_456));
        assert_eq!(total("events: Ir\n"), None);
    }
}

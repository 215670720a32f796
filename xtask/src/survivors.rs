//! docs/mutants.md: mutants that no test notices, each with the reason. A paragraph of it that begins with the change, and the
//! line of source it is made in, stands for a survivor:
//!
//! ```text
//! ## crates/engine/src/alloc.rs
//! - `replace > with >= in Allocator::extend` at `if count > room {`: why.
//! ```

use std::collections::BTreeMap;
use std::path::Path;

const PAGE: &str = "docs/mutants.md";

/// A mutant that no test notices.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Survivor {
    pub(crate) file: String,
    /// What is changed, as cargo-mutants says it.
    pub(crate) change: String,
    /// The line it is changed in: unlike its number it stays when others come and go.
    pub(crate) line: String,
}

/// Those on the page.
pub(crate) fn listed(root: &Path) -> Result<Vec<Survivor>, String> {
    let text =
        std::fs::read_to_string(root.join(PAGE)).map_err(|error| format!("{PAGE}: {error}"))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<Survivor>, String> {
    let mut file = None;
    let mut survivors = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if let Some(heading) = line.strip_prefix("## ") {
            file = heading.starts_with("crates/").then_some(heading);
        }
        let (Some(file), Some(entry)) = (file, line.strip_prefix("- `")) else {
            continue;
        };
        let survivor = entry.split_once("` at `").and_then(|(change, rest)| {
            let (line, reason) = rest.split_once("`: ")?;
            (!reason.is_empty()).then(|| Survivor {
                file: file.to_owned(),
                change: change.to_owned(),
                line: line.to_owned(),
            })
        });
        survivors.push(survivor.ok_or_else(|| {
            format!(
                "{PAGE}:{}: not \"- `CHANGE` at `LINE`: REASON\"",
                number + 1
            )
        })?);
    }
    Ok(survivors)
}

/// Whether each of them is still in the source.
pub(crate) fn check(root: &Path, faults: &mut Vec<String>) {
    let survivors = match listed(root) {
        Ok(survivors) => survivors,
        Err(error) => return faults.push(error),
    };
    let mut sources: BTreeMap<&str, String> = BTreeMap::new();
    for survivor in &survivors {
        let source = sources.entry(&survivor.file).or_insert_with(|| {
            std::fs::read_to_string(root.join(&survivor.file)).unwrap_or_default()
        });
        if !is_there(survivor, source) {
            faults.push(format!(
                "{PAGE}: {} has no line {:?} any more",
                survivor.file, survivor.line
            ));
        }
    }
}

fn is_there(survivor: &Survivor, source: &str) -> bool {
    source.lines().any(|line| line.trim() == survivor.line)
}

#[cfg(test)]
mod tests {
    //! Guards against a page that is not read: a survivor without a reason must not pass for one that has one.

    use super::*;

    #[test]
    fn an_entry_needs_its_line_and_a_reason() {
        let page = "# Mutants\n- `free` text\n## crates/a.rs\n- `replace + with -` at `1 + 2`: why\n  so.\n";
        let survivors = parse(page).unwrap();
        assert_eq!(survivors.len(), 1);
        assert_eq!(survivors[0].file, "crates/a.rs");
        assert!(is_there(&survivors[0], "fn a() {\n    1 + 2\n}\n"));
        assert!(!is_there(&survivors[0], "fn a() {\n    1 + 3\n}\n"));
        assert!(parse("## crates/a.rs\n- `replace + with -` at `1 + 2`: \n").is_err());
        assert!(parse("## crates/a.rs\n- `replace + with -`: why\n").is_err());
    }
}

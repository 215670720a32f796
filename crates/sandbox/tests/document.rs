//! Guards docs/SANDBOX.md, from which authors of virtual machine monitors make their own filters: its table is that of the filter.
//! `URUS_BLESS=1` writes it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

const BEGIN: &str = "<!-- calls: made by crates/sandbox/tests/document.rs -->\n";
const END: &str = "<!-- end of calls -->\n";

fn table() -> String {
    let mut text = String::from("\n| call | only | for |\n|---|---|---|\n");
    for call in urus_sandbox::calls() {
        let (name, condition, purpose) = (call.name, call.condition, call.purpose);
        writeln!(text, "| {name} | {condition} | {purpose} |").unwrap();
    }
    text.push('\n');
    text
}

#[test]
fn the_document_lists_the_calls_of_the_filter() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/SANDBOX.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the beginning of the table");
    let (found, after) = rest.split_once(END).expect("the end of the table");
    if std::env::var_os("URUS_BLESS").is_some() {
        fs::write(&path, [before, BEGIN, &table(), END, after].concat()).unwrap();
        return;
    }
    assert_eq!(found, table(), "run this test once with URUS_BLESS=1");
}

#[test]
fn no_call_is_listed_twice() {
    let mut names: Vec<_> = urus_sandbox::calls().iter().map(|call| call.name).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
}

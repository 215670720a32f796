//! Every entry of every corpus on stable, and whether whoever runs the targets notices what is wrong.

use std::process::{Command, Output};

use urus_fuzz_targets::{TARGETS, selftest};

fn fuzz(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_urus-fuzz"))
        .args(arguments)
        .output()
        .expect("the program runs")
}

fn text(output: &Output) -> String {
    let bytes = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Each entry was interesting once: it reached something new, or broke something that is mended.
#[test]
fn every_corpus_is_sound() {
    let output = fuzz(&["--replay", "true"]);
    let text = text(&output);
    println!("{text}");
    assert!(output.status.success(), "{text}");
    for target in TARGETS {
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("fuzz {} ", target.name)))
            .unwrap_or_else(|| panic!("no line for {}: {text}", target.name));
        let inputs: u64 = line
            .split_whitespace()
            .nth(2)
            .and_then(|word| word.parse().ok())
            .expect("a number of inputs");
        assert!(inputs > 0, "{line}");
    }
}

/// A judgement that cannot fail is none: each way of failing is seen, and told. (Most of the time they wait for one another's watchdogs, so
/// all go at once.)
#[test]
fn every_fault_is_noticed() {
    let faults = [
        (
            "selftest-violation",
            "VIOLATION: selftest-violation: a violation",
        ),
        ("selftest-panic", "panic: a panic"),
        ("selftest-thread", "panic: a panic elsewhere"),
        ("selftest-memory", "the process ended with signal"),
        ("selftest-time", "it takes"),
        ("selftest-hang", "does not end"),
    ];
    assert_eq!(
        selftest::TARGETS.len(),
        faults.len(),
        "one of them is not tried here"
    );
    std::thread::scope(|scope| {
        for (target, told) in faults {
            scope.spawn(move || {
                let output = fuzz(&["--target", target, "--inputs", "60", "--seed", "3"]);
                let text = text(&output);
                assert_eq!(output.status.code(), Some(1), "{target}: {text}");
                assert!(text.contains(told), "{target}: {text}");
            });
        }
    });
}

/// A wrong name, or a corpus that is not there, is no success.
#[test]
fn nothing_to_do_is_a_failure() {
    assert_eq!(fuzz(&["--target", "nonsense"]).status.code(), Some(2));
    let output = fuzz(&[
        "--target", "header", "--corpus", "nowhere", "--replay", "true",
    ]);
    assert_ne!(output.status.code(), Some(0));
}

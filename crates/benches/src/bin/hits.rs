//! `hits CASE COUNT`: makes a disk, warms it, and makes that many hits. What `cargo xtask instructions` runs under callgrind, twice with
//! different counts: the difference is that of the hits alone.

use std::process::ExitCode;

use urus_benches::hits::{Case, Hits};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match arguments.as_slice() {
        [name, count] => Case::from_name(name).zip(count.parse().ok()),
        _ => None,
    };
    let Some((case, count)) = parsed else {
        let names = Case::ALL.map(Case::name);
        eprintln!("usage: hits {} COUNT", names.join("|"));
        return ExitCode::from(2);
    };
    Hits::new(case).run(count);
    ExitCode::SUCCESS
}

//! The Debian packages that the tests need, from the list that the tests themselves read.

use std::path::Path;
use std::process::Command;

struct Need {
    kind: String,
    name: String,
    /// Alternatives, the preferred first.
    packages: Vec<String>,
}

/// Installs what is missing, or says what is.
pub(crate) fn install(root: &Path) -> Result<(), String> {
    let list = root.join("tests/packages.txt");
    let text =
        std::fs::read_to_string(&list).map_err(|error| format!("{}: {error}", list.display()))?;
    let needs = parse(&text)?;
    let missing: Vec<&Need> = needs.iter().filter(|need| !present(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() {
        return Err(format!(
            "missing: {}; install them, or run as root",
            wanted(&missing).join(" ")
        ));
    }
    apt(&["update", "-q"])?;
    for alternative in 0..2 {
        let missing: Vec<&Need> = needs.iter().filter(|need| !present(need)).collect();
        let packages = choose(&missing, alternative);
        if !packages.is_empty() {
            let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
            arguments.extend(packages.iter().map(String::as_str));
            apt(&arguments)?;
        }
    }
    let missing: Vec<&Need> = needs.iter().filter(|need| !present(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|need| need.name.as_str()).collect();
    Err(format!(
        "still missing after installing {}: {}",
        wanted(&missing).join(" "),
        names.join(" ")
    ))
}

fn parse(text: &str) -> Result<Vec<Need>, String> {
    let mut needs = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
    {
        let [kind, name, packages] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return Err(format!("tests/packages.txt: not three words: {line}"));
        };
        let packages = packages.split('|').map(str::to_owned).collect();
        needs.push(Need {
            kind: kind.to_owned(),
            name: name.to_owned(),
            packages,
        });
    }
    Ok(needs)
}

fn present(need: &Need) -> bool {
    match need.kind.as_str() {
        "program" => ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .iter()
            .any(|directory| Path::new(directory).join(&need.name).is_file()),
        "python" => succeeds(
            "/usr/bin/python3",
            &["-c", &format!("import {}", need.name)],
        ),
        "nbdkit" => succeeds("nbdkit", &[&need.name, "--version"]),
        _ => false,
    }
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|output| output.status.success())
}

fn is_root() -> bool {
    Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}

fn wanted(needs: &[&Need]) -> Vec<String> {
    choose(needs, 0)
}

/// The packages to try: of each need the preferred one that the archive has, or the next.
fn choose(needs: &[&Need], from: usize) -> Vec<String> {
    let mut packages: Vec<String> = needs
        .iter()
        .filter_map(|need| {
            let known = need
                .packages
                .iter()
                .skip(from)
                .find(|package| known(package));
            known.or(need.packages.get(from)).cloned()
        })
        .collect();
    packages.sort();
    packages.dedup();
    packages
}

fn known(package: &str) -> bool {
    succeeds("apt-cache", &["show", package])
}

fn apt(arguments: &[&str]) -> Result<(), String> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .map_err(|error| format!("apt-get: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!(
            "apt-get {} ended with {status}",
            arguments.join(" ")
        ))
    }
}

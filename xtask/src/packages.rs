//! The Debian packages that the tests need, from the list that the tests themselves read.

use std::path::Path;
use std::process::Command;

struct Need {
    kind: String,
    name: String,
    /// Alternatives, the preferred first.
    packages: Vec<String>,
}

/// Never at the price of something that is there.
const INSTALL: [&str; 5] = [
    "install",
    "-q",
    "-y",
    "--no-install-recommends",
    "--no-remove",
];

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
    if let Some(release) = qemu_release()
        && missing
            .iter()
            .any(|need| need.packages == ["qemu-system-x86"])
    {
        install_qemu(&release)?;
    }
    apt(&["update", "-q"])?;
    for alternative in 0..2 {
        let missing: Vec<&Need> = needs.iter().filter(|need| !present(need)).collect();
        let packages = choose(&missing, alternative);
        if !packages.is_empty() {
            let mut arguments = INSTALL.to_vec();
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

/// The release that QEMU's programs came from, where that is Debian's backports: all of QEMU has to come from there,
/// because its packages conflict with those of another version.
fn qemu_release() -> Option<String> {
    let version = output("dpkg-query", &["-W", "-f", "${Version}", "qemu-utils"])?;
    let (codename, _) = main_archive()?;
    version
        .contains("~bpo")
        .then(|| format!("{codename}-backports"))
}

/// Codename and address of the archive that this machine installs from.
fn main_archive() -> Option<(String, String)> {
    let format = "$(CODENAME) $(COMPONENT) $(REPO_URI)";
    let targets = output(
        "apt-get",
        &["indextargets", "--format", format, "Created-By: Packages"],
    )?;
    targets.lines().find_map(|line| {
        let [codename, "main", address] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return None;
        };
        // bookworm, and not bookworm-updates.
        (!codename.contains('-')).then(|| (codename.to_owned(), address.to_owned()))
    })
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(text)
}

/// Installs QEMU's emulator from a release that the machine's own list of sources need not have.
fn install_qemu(release: &str) -> Result<(), String> {
    let (codename, address) = main_archive().ok_or("apt-get knows no archive")?;
    let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    let signed = if keyring.is_file() {
        format!("[signed-by={}] ", keyring.display())
    } else {
        String::new()
    };
    let list = std::env::temp_dir().join(format!("urus-xtask-{}.list", std::process::id()));
    let sources = [codename.as_str(), release]
        .map(|release| format!("deb {signed}{address} {release} main\n"))
        .concat();
    std::fs::write(&list, sources).map_err(|error| format!("{}: {error}", list.display()))?;
    let only = format!("Dir::Etc::sourcelist={}", list.display());
    let options = ["-o", only.as_str(), "-o", "Dir::Etc::sourceparts=-"];
    let packages = [
        "qemu-system-x86",
        "qemu-system-common",
        "qemu-system-data",
        "seabios",
    ]
    .map(|package| format!("{package}/{release}"));
    let run = |more: &[&str]| apt(&[&options[..], more].concat());
    let installed = run(&["update", "-q"]).and_then(|()| {
        let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
        run(&[&INSTALL[..], &packages].concat())
    });
    let removed = std::fs::remove_file(&list);
    installed?;
    removed.map_err(|error| format!("{}: {error}", list.display()))
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

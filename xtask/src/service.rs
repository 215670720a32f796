//! The units of `dist/` under a real systemd: `service.sh` says what is looked at.
//!
//! The system is a container in memory (systemd-nspawn): this machine's `/usr`, read-only, with the program and the units laid over it; an
//! empty `/etc`, so that nothing else of this machine starts; no network. It boots in some seconds and is gone afterwards.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::steps::Steps;

const SCRIPT: &str = include_str!("service.sh");
/// What the script's last line says.
const WELL: &str = "all is well";

/// Runs the script in place of everything that a machine usually starts, and ends the container with it.
const UNIT: &str = "\
[Unit]
Requires=basic.target
After=basic.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
TimeoutStartSec=180
ExecStart=/bin/bash -c 'exec bash /check/service.sh >/check/log 2>&1'
";

/// Boots the container and judges what the script has said. The program is built.
pub(crate) fn run(steps: &mut Steps) {
    let target = steps.target_directory();
    steps.check("service", |root| {
        let scratch = target.join("urus-scratch").join("service");
        let result = lay_out(root, &target.join("debug").join("urus"), &scratch)
            .map_err(|error| format!("{}: {error}", scratch.display()))
            .and_then(|()| boot(&scratch));
        // A container that was killed may still hold it: the next run clears it.
        let _ = fs::remove_dir_all(&scratch);
        result
    });
}

/// `usr` is laid over this machine's, `check` has the script and its log, `images` becomes /var/lib/urus.
fn lay_out(root: &Path, program: &Path, scratch: &Path) -> std::io::Result<()> {
    if scratch.exists() {
        fs::remove_dir_all(scratch)?;
    }
    let units = scratch.join("usr/lib/systemd/system");
    for directory in ["usr/bin", "usr/lib/systemd/system", "check", "images"] {
        fs::create_dir_all(scratch.join(directory))?;
    }
    fs::copy(program, scratch.join("usr/bin/urus"))?;
    for unit in ["urus@.service", "urus@.socket"] {
        fs::copy(root.join("dist").join(unit), units.join(unit))?;
    }
    fs::write(units.join("urus-check.service"), UNIT)?;
    fs::write(scratch.join("check/service.sh"), SCRIPT)
}

fn boot(scratch: &Path) -> Result<(), String> {
    let at = |directory: &str| scratch.join(directory).display().to_string();
    // A container that does not end by itself is told to, and then killed.
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=20", "240", "systemd-nspawn"])
        .args(["--quiet", "--boot", "--directory=/", "--volatile=yes"])
        .args(["--machine=urus-check", "--private-network"])
        .args(["--console=pipe", "--register=no"])
        .arg(format!("--overlay-ro=/usr:{}:/usr", at("usr")))
        .arg(format!("--bind={}:/check", at("check")))
        .arg(format!("--bind={}:/var/lib/urus", at("images")));
    if !Path::new("/run/systemd/system").is_dir() {
        // No systemd here that could give it a scope.
        command.arg("--keep-unit");
    }
    command.arg("systemd.unit=urus-check.service");
    let output = command
        .output()
        .map_err(|error| format!("{command:?} did not start: {error}"))?;
    let log = fs::read_to_string(scratch.join("check/log")).unwrap_or_default();
    print!("{log}");
    if log.lines().last() == Some(WELL) {
        return Ok(());
    }
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    Err(format!(
        "the units do not do what docs/SERVICE.md says, or no container boots here (that needs root and systemd-container); systemd-nspawn \
         ended with {}: {} {}",
        output.status,
        out.trim(),
        err.trim()
    ))
}

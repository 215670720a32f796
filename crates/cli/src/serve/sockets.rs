//! Where `urus serve` listens for NBD clients, in our words and in qemu-nbd's, and who may connect to unix sockets.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use urus_listen::{Listen, Permissions};

use crate::failure::Failure;

/// NBD's registered port.
const NBD_PORT: u16 = 10809;

#[derive(Debug, clap::Args)]
pub(super) struct SocketArgs {
    /// The mode of the unix sockets of --nbd and --vhost-user, in octal: who can write it can connect [default: 0777 less the umask]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    socket_mode: Option<u32>,

    /// The group of those sockets, by name or number; without --socket-mode they have the mode 0660 then
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,

    /// As --nbd unix:PATH
    #[arg(short = 'k', long = "socket", value_name = "PATH", help_heading = QEMU_NBD)]
    socket: Vec<PathBuf>,

    /// As --nbd HOST:PORT, with the host of --bind. Without that only this machine can connect, other than with qemu-nbd
    #[arg(short, long, value_name = "PORT", help_heading = QEMU_NBD)]
    port: Option<u16>,

    /// As --nbd HOST:PORT, with the port of --port [default: 10809]
    #[arg(short, long, value_name = "HOST", help_heading = QEMU_NBD)]
    bind: Option<String>,

    /// Serve on after the last client has gone: urus always does
    #[arg(short = 't', long, help_heading = QEMU_NBD)]
    persistent: bool,

    /// Offer qemu:allocation-depth: urus always does
    #[arg(short = 'A', long, help_heading = QEMU_NBD)]
    allocation_depth: bool,

    /// Only 'off': urus does not look for zeroes in what is written
    #[arg(long, value_name = "MODE", value_parser = detect_zeroes, help_heading = QEMU_NBD)]
    detect_zeroes: Option<()>,
}

pub(super) const QEMU_NBD: &str = "Options of qemu-nbd that are understood";

fn mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 && !digits.starts_with('+') => Ok(mode),
        _ => Err("expected an octal number up to 0777, such as 0660".into()),
    }
}

fn detect_zeroes(text: &str) -> Result<(), String> {
    match text {
        "off" => Ok(()),
        _ => Err(
            "urus does not look for zeroes in what is written; clients can trim and write zeroes (fstrim in a guest), \
             and qemu-img convert leaves zeroes out of a copy"
                .into(),
        ),
    }
}

impl SocketArgs {
    /// The addresses in qemu-nbd's words, each with what it was given by.
    pub(super) fn addresses(&self) -> impl Iterator<Item = Listen> {
        let sockets = self.socket.iter().cloned().map(Listen::Unix);
        let tcp = (self.port.is_some() || self.bind.is_some()).then(|| {
            let host = self.bind.as_deref().unwrap_or("localhost");
            let port = self.port.unwrap_or(NBD_PORT);
            let is_v6 = host.contains(':') && !host.starts_with('[');
            Listen::Tcp(if is_v6 {
                format!("[{host}]:{port}")
            } else {
                format!("{host}:{port}")
            })
        });
        sockets.chain(tcp)
    }

    /// Who may connect to unix sockets. Reads files, so it is asked early.
    pub(super) fn permissions(&self) -> Result<Permissions, Failure> {
        let group = self.socket_group.as_deref().map(group).transpose()?;
        Ok(Permissions {
            mode: self.socket_mode,
            group,
        })
    }
}

/// The number of a group: as given, from /etc/group, or as the system's other sources of names have it (getent).
fn group(name: &str) -> Result<u32, Failure> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let number_in = |text: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
        })
    };
    let groups = fs::read("/etc/group").unwrap_or_default();
    let known = number_in(&String::from_utf8_lossy(&groups));
    let asked = || {
        let output = Command::new("getent")
            .args(["group", "--", name])
            .output()
            .ok()?;
        number_in(&String::from_utf8_lossy(&output.stdout))
    };
    known.or_else(asked).ok_or_else(|| {
        Failure::usage(format!(
            "--socket-group: there is no group '{name}' (getent group lists them); a number is taken as well"
        ))
    })
}

/// Refuses one path for two purposes.
pub(super) fn refuse_twice<'a>(
    paths: impl IntoIterator<Item = (&'static str, &'a Path)>,
) -> Result<(), Failure> {
    let mut seen: Vec<(&str, PathBuf)> = Vec::new();
    for (option, path) in paths {
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if let Some((other, _)) = seen.iter().find(|(_, seen)| *seen == whole) {
            let path = path.display();
            return Err(Failure::usage(if *other == option {
                format!("{option}: {path} is given twice; give each address once")
            } else {
                format!("{other} and {option} are both given {path}; each needs a path of its own")
            }));
        }
        seen.push((option, whole));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Guards what qemu-nbd's options are taken for.
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(mode("0660"), Ok(0o660));
        assert_eq!(mode("600"), Ok(0o600));
        for text in ["", "8", "1000", "-1", "+600", "rw"] {
            assert!(mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!(group("root").ok(), Some(0));
        assert_eq!(group("12345").ok(), Some(12345));
        let missing = group("no-such-group").unwrap_err();
        assert!(missing.text().contains("no-such-group"));
    }
}

//! What to say to options and commands that people bring from qemu-nbd and qemu-img, and that urus has not: what it has instead.
//! (clap would propose options that have a few letters in common.)

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Options of qemu-nbd without a counterpart here. Those that have one are options of `urus serve`.
const OPTIONS: [(&[&str], &str); 15] = [
    (
        &["--fork"],
        "urus stays in the foreground: end the line with '&', or let a service manager start it (docs/SERVICE.md). The server is ready \
         when its socket is there",
    ),
    (
        &["-c", "--connect"],
        "urus does not attach kernel devices itself: serve the image, then nbd-client -unix SOCKET /dev/nbd0 (docs/ATTACH.md)",
    ),
    (
        &["-d", "--disconnect"],
        "urus does not attach kernel devices itself: nbd-client -d /dev/nbd0 detaches one (docs/ATTACH.md)",
    ),
    (
        &["-L", "--list"],
        "urus is no NBD client: nbdinfo --list URI lists the exports of a server",
    ),
    (
        &["-P", "--partition"],
        "urus serves whole disks; for one partition: nbdkit --filter=partition nbd URI partition=N",
    ),
    (
        &["-o", "--offset"],
        "urus serves whole disks; for a part of one: nbdkit --filter=offset nbd URI offset=BYTES",
    ),
    (
        &["-B", "--bitmap"],
        "urus does not export dirty bitmaps; qemu-nbd -B does",
    ),
    (
        &["-l", "--load-snapshot"],
        "urus does not serve internal snapshots; make an image of one: qemu-img convert -l snapshot.name=NAME -O qcow2 IMAGE NEW-IMAGE",
    ),
    (
        &["--image-opts"],
        "urus takes file names only; give the image's format with -f and the rest as options (`urus serve --help`)",
    ),
    (
        &["--object", "--tls-hostname"],
        "urus needs no objects: for TLS give the directory of the certificates with --tls-creds DIR",
    ),
    (
        &["--tls-authz"],
        "urus has no list of clients; --tls-verify-peer serves those whose certificate ca-cert.pem has signed",
    ),
    (
        &["-T", "--trace"],
        "urus has no trace points; -v, -vv and -vvv say more on standard error",
    ),
    (
        &["--handshake-limit"],
        "a client has 30 seconds to choose an export; there is no option for it",
    ),
    (
        &["--daemonize", "--daemon"],
        "urus stays in the foreground: end the line with '&', or let a service manager start it (docs/SERVICE.md)",
    ),
    (
        &["--persistent-reservations"],
        "urus has no persistent reservations",
    ),
];

/// Values that qemu-nbd's options can have, and ours of the same name not.
const VALUES: [(&str, &str, &str); 5] = [
    (
        "--cache",
        "writethrough",
        "writeback is as safe: a flush is durable, and so is a write that asks for it (FUA); leave --cache away",
    ),
    (
        "--cache",
        "directsync",
        "give --cache none: past the page cache, and a flush is durable",
    ),
    (
        "--cache",
        "unsafe",
        "urus never ignores a flush; to write without keeping anything there is --snapshot",
    ),
    (
        "--io",
        "native",
        "urus has no Linux AIO; leave the option away, and io_uring is used where the kernel has it",
    ),
    (
        "--format",
        "",
        "urus serves qcow2 and raw; convert others: qemu-img convert -p -O qcow2 IMAGE NEW-IMAGE",
    ),
];

/// Commands of qemu-img without a counterpart here.
const COMMANDS: [(&str, &str); 10] = [
    (
        "resize",
        "an image that nobody has open grows by qemu-img resize IMAGE +SIZE, one that urus serves by urus ctl resize SOCKET +SIZE \
         (serve it with --control unix:SOCKET)",
    ),
    (
        "convert",
        "use qemu-img convert; of an image that is served, nbdcopy or qemu-img convert copy it by the line that urus serve prints",
    ),
    (
        "snapshot",
        "use qemu-img snapshot while nobody has the image open; writes that are not to be kept: urus serve --snapshot",
    ),
    (
        "rebase",
        "use qemu-img rebase while nobody has the image open",
    ),
    (
        "commit",
        "use qemu-img commit while nobody has the image open",
    ),
    (
        "amend",
        "use qemu-img amend while nobody has the image open",
    ),
    ("compare", "use qemu-img compare"),
    ("measure", "use qemu-img measure"),
    (
        "bitmap",
        "use qemu-img bitmap while nobody has the image open",
    ),
    ("dd", "use qemu-img dd"),
];

/// The whole message for a command line that was not understood. None where clap says it best.
pub(crate) fn to(error: &clap::Error, arguments: &[OsString]) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let command = text(ContextKind::InvalidSubcommand)?;
            let (_, answer) = COMMANDS.iter().find(|(name, _)| *name == command)?;
            Some(format!("urus: there is no command '{command}': {answer}"))
        }
        ErrorKind::UnknownArgument => {
            let option = text(ContextKind::InvalidArg)?;
            let serves = arguments.iter().any(|word| word == "serve");
            let answer = OPTIONS
                .iter()
                .find(|(names, _)| serves && names.contains(&option));
            match answer {
                Some((_, answer)) => Some(format!("urus: no option '{option}': {answer}")),
                None => Some(without_wild_tips(error)),
            }
        }
        ErrorKind::InvalidValue => {
            let (option, value) = (
                text(ContextKind::InvalidArg)?,
                text(ContextKind::InvalidValue)?,
            );
            let option = option.split_whitespace().next()?;
            let (_, _, answer) = VALUES
                .iter()
                .find(|(name, bad, _)| *name == option && (*bad == value || bad.is_empty()))?;
            Some(format!("urus: {option} {value} is not possible: {answer}"))
        }
        _ => None,
    }
}

/// clap's message, less its proposals: an option that it does not know is no file name, nor a wrong way to write another.
fn without_wild_tips(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("tip:"))
        // It shows what was proposed as if it were needed.
        .filter(|line| !line.starts_with("Usage:"))
        .collect();
    lines.dedup();
    lines.join("\n").trim_end().to_owned()
}

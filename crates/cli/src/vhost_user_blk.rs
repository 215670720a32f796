//! `urus vhost-user-blk`: a back-end program as QEMU's interop/vhost-user document describes them ("Backend program
//! conventions"), for management software that starts such programs by itself.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use urus::{OpenOptions, Prepared};
use urus_vhost_user::{Listener, Server};

use crate::common::{BackingArgs, CacheArg, DiscardArg, FormatArg, IoArg};
use crate::confine::SandboxArgs;
use crate::control::{Control, ControlArgs, Controlled, path_or_address};
use crate::failure::{Failure, Outcome};
use crate::metrics::{Metrics, MetricsArgs, Sources};
use crate::output::print;
use crate::patience::Patience;
use crate::serve::{OpenError, make_room, names_are_there, patiently, tell_of_leaks};
use crate::signals::Stop;

/// What this program can do, in the words of the conventions' block device features.
const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}
"#;

const SUBCOMMAND: &str = "vhost-user-blk";

/// The name under which the program is installed for management software, which knows of no subcommands.
const PROGRAM: &str = "urus-vhost-user-blk";

/// The arguments with the subcommand in front when the program was called by its other name.
pub(crate) fn as_program(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == PROGRAM) {
        arguments.insert(1, SUBCOMMAND.into());
    }
    arguments
}

/// Whether this is `--print-capabilities`, beside which the conventions want all other options ignored, be they what
/// they may.
pub(crate) fn asks_for_capabilities(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|word| word == SUBCOMMAND)
        && arguments.iter().any(|word| word == "--print-capabilities")
}

pub(crate) fn print_capabilities() -> ExitCode {
    print(CAPABILITIES);
    ExitCode::SUCCESS
}

/// Serve an image to a virtual machine, as a vhost-user back-end program of QEMU's conventions
///
/// Stays in the foreground. SIGTERM finishes what was begun, makes everything durable and ends with 0. With a connected --fd, so does
/// the end of the connection.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("socket").args(["socket_path", "fd"]))]
pub(crate) struct Args {
    /// Listen at this unix socket (PATH or unix:PATH)
    #[arg(long, value_name = "PATH", value_parser = path_or_address)]
    socket_path: Option<PathBuf>,

    /// Use the unix socket that is file descriptor FDNUM: connected, or listening
    #[arg(long, value_name = "FDNUM")]
    fd: Option<i32>,

    /// Print what this program can do as JSON, and exit; other options are ignored
    #[arg(long)]
    #[allow(
        dead_code,
        reason = "seen before the rest is parsed; here for the help"
    )]
    print_capabilities: bool,

    /// The image
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// Refuse writes, and open the image read-only
    #[arg(long)]
    read_only: bool,

    /// Format of the image; never guessed, so raw has to be stated
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2")]
    format: FormatArg,

    /// Virtqueues, each with a thread and a ring of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    num_queues: u16,

    /// The serial number that the virtual machine sees, at most 20 bytes
    #[arg(long, value_name = "S", default_value = "")]
    serial: String,

    /// What lies between the image and the disk
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: CacheArg,

    /// What does the I/O
    #[arg(long, value_name = "DRIVER", default_value = "auto")]
    io: IoArg,

    /// What the guest's discards do
    #[arg(long, value_name = "POLICY", default_value = "unmap")]
    discard: DiscardArg,

    #[command(flatten)]
    backing: BackingArgs,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    metrics: MetricsArgs,

    #[command(flatten)]
    sandbox: SandboxArgs,
}

impl Args {
    /// The image, for logs.
    pub(crate) fn image(&self) -> &Path {
        self.blk_file.as_deref().unwrap_or_else(|| "".as_ref())
    }
}

pub(crate) fn run(args: Args) -> Outcome {
    // Before the image is opened, so that no signal ends the process with the image open.
    let mut stop = Stop::watch()
        .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
    make_room();
    let Some(image) = &args.blk_file else {
        return Err(Failure::usage(
            "--blk-file PATH is missing: the image to serve",
        ));
    };
    let listener = listener(&args)?;
    let control = args.control.bind()?;
    let metrics = args.metrics.bind()?;
    let prepared = prepare(&args, image)?;
    let made = [
        args.socket_path.as_deref(),
        args.control.path(),
        args.metrics.path(),
    ];
    args.sandbox
        .restrict_files([], made.into_iter().flatten())?;
    let device = prepared.start()?;
    let server = Server::builder(device.clone(), listener)
        .queues(args.num_queues.into())
        .serial(&args.serial)
        .on_end(stop.ender())
        .start()?;
    let controlled = Controlled {
        name: String::new(),
        device: device.clone(),
    };
    let mut control = control
        .map(|listener| Control::start(listener, vec![controlled.clone()]))
        .transpose()?;
    let sources = Sources {
        images: vec![controlled],
        nbd: None,
        vhost_user: Some(server.monitor()),
    };
    let _metrics = metrics
        .map(|listener| Metrics::start(listener, sources))
        .transpose()?;
    args.sandbox.restrict_calls()?;
    tell_of_leaks(&device);
    let signal = stop.wait();
    tracing::info!(signal, "stopping");
    // First: the server waits for the requests that a pause holds.
    if let Some(control) = &mut control {
        control.end();
    }
    // Closed whatever becomes of the server: what the guest has written is to be safe.
    let patience = Patience::start(vec![device.clone()]);
    let ended = server.shutdown();
    drop(patience);
    device.close()?;
    ended?;
    names_are_there(&device)?;
    Ok(ExitCode::SUCCESS)
}

fn listener(args: &Args) -> Result<Listener, Failure> {
    match (&args.socket_path, args.fd) {
        (Some(path), _) => Ok(Listener::bind(path)?),
        (None, Some(number)) => {
            // Ours to use by the conventions; but the number may be anything, so a copy is asked of the kernel.
            let copy = pidfd_open(getpid(), PidfdFlags::empty())
                .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()))
                .map_err(|error| Failure::new(format!("--fd {number}: {error}")))?;
            Ok(Listener::from_fd(copy)?)
        }
        (None, None) => Err(Failure::usage(
            "--socket-path PATH or --fd FDNUM is missing: where the virtual machine connects",
        )),
    }
}

fn prepare(args: &Args, image: &Path) -> Result<Prepared, Failure> {
    let mut options = OpenOptions::new();
    options
        .format(args.format.into())
        .read_only(args.read_only)
        .cache(args.cache.into())
        .io(args.io.into())
        .discard(args.discard.into())
        .count_leaks(true)
        .latencies(true);
    args.backing.apply(&mut options);
    patiently(|| options.prepare(image).map_err(OpenError::from))
}

//! `urus serve`: an image as an NBD export, as a disk for a virtual machine (vhost-user-blk), or both, until a signal
//! says that it is enough.

mod banner;
mod descriptors;
mod export;
mod service;
mod sockets;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use urus::{CreateOptions, Device, Format, InfoOptions, OpenOptions, Prepared};
use urus_listen::{Listen, Listener, Permissions};
use urus_nbd::{Server, ServerBuilder};
use urus_vhost_user::{Listener as VhostListener, Server as VhostServer};

use crate::check::RepairArg;
use crate::common::{BackingArgs, CacheArg, DiscardArg, FormatArg, IoArg};
use crate::confine::SandboxArgs;
use crate::control::{Control, ControlArgs, Controlled, path_or_address};
use crate::failure::{Failure, Outcome};
use crate::metrics::{Metrics, MetricsArgs, Sources};
use crate::output::{complain, print};
use crate::patience::Patience;
use crate::signals::Stop;
use crate::size::Size;

/// Serve an image over NBD, or to a virtual machine over vhost-user-blk
///
/// Prints what it serves, with lines to paste for nbdcopy, qemu-img, fio and QEMU, and serves until SIGTERM or SIGINT (Ctrl-C). Then it takes no more
/// requests, finishes those it has begun, makes everything durable, closes the image cleanly, removes its socket and exits with 0
/// (1 if something could not be made durable, or the image was deleted meanwhile). A second signal changes nothing: the image is
/// closed as fast as the disk allows. A server that is killed (SIGKILL, power) loses nothing that was flushed, and the image needs no repair.
/// At most some clusters stay allocated that nothing uses: --repair leaks gives them back.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Unix sockets appear when the server is ready. Over TCP there is neither encryption nor authentication: keep to localhost or \
                  to a network that you trust, or use --tls-creds. A service manager can pass sockets to listen on (LISTEN_FDS), \
                  which are used as if --nbd had named them."
)]
pub(crate) struct Args {
    /// The image
    pub(crate) image: PathBuf,

    /// Format of the image; never guessed, so raw has to be stated
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2")]
    format: FormatArg,

    /// Create the image if it does not exist; if it does, it must have this size (8G, 1.5T)
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    create: Option<Size>,

    /// Listen here: unix:PATH (or a path with a slash) or HOST:PORT; may be given several times. A unix
    /// socket that a killed server has left is replaced [default: unix:IMAGE.nbd.sock, unless --vhost-user is given]
    #[arg(long = "nbd", value_name = "ADDRESS")]
    nbd: Vec<String>,

    /// Listen for a virtual machine at this unix socket (PATH or unix:PATH): a vhost-user-blk device. A socket that a killed server has
    /// left is replaced
    #[arg(long, value_name = "PATH", value_parser = path_or_address)]
    vhost_user: Option<PathBuf>,

    /// The serial number that the virtual machine sees, at most 20 bytes
    #[arg(long, value_name = "S", default_value = "", requires = "vhost_user")]
    serial: String,

    /// Look for the virtual machine's requests for up to N microseconds before sleeping [default: 0, no polling]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, requires = "vhost_user",
          value_parser = clap::value_parser!(u64).range(..=100_000))]
    poll_us: u64,

    /// Refuse writes, and open the image read-only
    #[arg(short, long, conflicts_with = "create")]
    read_only: bool,

    /// Leave the image as it is: it is opened read-only, and what is written goes to a temporary overlay in $TMPDIR (or /var/tmp) that
    /// is gone when the server ends
    #[arg(short, long, conflicts_with_all = ["read_only", "create"])]
    snapshot: bool,

    /// As --cache none
    #[arg(short, long, conflicts_with = "cache", help_heading = sockets::QEMU_NBD)]
    nocache: bool,
    /// Check the image before it is served, and repair it: `leaks` gives back clusters that nothing uses, `all` repairs what can be
    /// repaired. Reads all metadata. Without it a server counts the leaks of small images (up to 8 MiB of tables) and tells of them;
    /// `urus check` does so for all
    #[arg(long, value_name = "WHAT", conflicts_with = "read_only")]
    repair: Option<RepairArg>,

    /// Let the virtual machine's writes complete before they are durable, although it could outlive this process: faster, and what it
    /// has not flushed is lost if this process is killed while it goes on
    #[arg(long, requires = "vhost_user")]
    volatile_cache: bool,

    /// Keep all of the virtual machine's memory in the host's, so that the kernel looks its pages up once and not for each request. Not for
    /// machines with a balloon, nor for more memory than the host has
    #[arg(long, requires = "vhost_user")]
    pin_guest_memory: bool,

    /// Queues, each with a thread and a ring of its own: NBD connections are spread over them, a virtual machine can use as many
    /// [default: one per CPU, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    num_queues: Option<u16>,

    /// Requests in flight per queue
    #[arg(long, value_name = "N", default_value_t = 128,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(urus::MAX_QUEUE_DEPTH)))]
    queue_size: u32,

    /// What lies between the image and the disk
    #[arg(long, value_name = "MODE", default_value = "writeback")]
    cache: CacheArg,

    /// What does the I/O
    #[arg(
        long,
        visible_alias = "aio",
        value_name = "DRIVER",
        default_value = "auto"
    )]
    io: IoArg,

    /// What a client's discards do
    #[arg(long, value_name = "POLICY", default_value = "unmap")]
    discard: DiscardArg,

    #[command(flatten)]
    export: export::ExportArgs,

    #[command(flatten)]
    sockets: sockets::SocketArgs,

    #[command(flatten)]
    backing: BackingArgs,

    /// Memory for cached L2 tables, of the whole image [default: 64M, which maps 512G with clusters of 64K]
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    l2_cache_size: Option<Size>,

    #[command(flatten)]
    sandbox: SandboxArgs,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    metrics: MetricsArgs,

    #[command(flatten)]
    service: service::ServiceArgs,
}

impl Args {
    /// Asked once: finding out the number of processors reads files.
    fn queues(&self) -> usize {
        /// Beyond that, one image rarely gains.
        const MOST: usize = 4;
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        match self.num_queues {
            Some(queues) => queues.into(),
            None => *PROCESSORS.get_or_init(|| {
                std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MOST))
            }),
        }
    }

    fn open_options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options
            .format(self.format.into())
            .read_only(self.read_only)
            .cache(self.cache().into())
            .io(self.io.into())
            .discard(self.discard.into())
            .queue_depth(self.queue_size)
            .count_leaks(true)
            .latencies(true);
        if let Some(repair) = self.repair {
            options.repair(repair.into());
        }
        if let Some(Size(bytes)) = self.l2_cache_size {
            options.l2_cache_bytes(bytes);
        }
        if let Some(directory) = self.snapshot_directory() {
            options.snapshot(directory);
        }
        self.backing.apply(&mut options);
        options
    }

    fn cache(&self) -> CacheArg {
        if self.nocache {
            CacheArg::None
        } else {
            self.cache
        }
    }

    /// Where temporary overlays are made. /tmp may be memory.
    fn snapshot_directory(&self) -> Option<PathBuf> {
        let chosen = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty());
        self.snapshot
            .then(|| chosen.map_or_else(|| "/var/tmp".into(), PathBuf::from))
    }

    /// Everything that is to lie at a path, each at one of its own.
    fn refuse_twice(&self, places: &Places) -> Result<(), Failure> {
        let sockets = places.paths().map(|path| ("--nbd", path));
        let others = [
            ("--vhost-user", self.vhost_user.as_deref()),
            ("--control", self.control.path()),
            ("--metrics", self.metrics.path()),
            ("--pid-file", self.service.pid_file.as_deref()),
        ];
        let others = others
            .into_iter()
            .filter_map(|(option, path)| Some((option, path?)));
        let image = ("the image", self.image.as_path());
        sockets::refuse_twice(std::iter::once(image).chain(sockets).chain(others))?;
        if self.read_only || self.snapshot {
            return Ok(());
        }
        let identity = |path: &Path| {
            let found = path.metadata().ok()?;
            Some((found.dev(), found.ino()))
        };
        let mut seen = vec![(None, identity(&self.image))];
        for (name, path) in self.export.other_images() {
            let this = identity(path);
            if let Some((other, _)) = seen
                .iter()
                .find(|(_, seen)| this.is_some() && *seen == this)
            {
                let other = other.map_or_else(
                    || self.image.display().to_string(),
                    |other| format!("--image {other}"),
                );
                return Err(Failure::usage(format!(
                    "--image {name}={} is the same file as {other}; only read-only (-r) can one image be served twice",
                    path.display()
                )));
            }
            seen.push((Some(name), this));
        }
        Ok(())
    }
}

pub(crate) fn run(args: Args) -> Outcome {
    // First of all, so that no signal ends the process with the image open.
    let mut stop = Stop::watch()
        .map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))?;
    make_room();
    let places = Places::of(&args)?;
    args.refuse_twice(&places)?;
    let permissions = args.sockets.permissions()?;
    places.look()?;
    let credentials = args.export.credentials()?;
    let vhost_listener = args
        .vhost_user
        .as_ref()
        .map(|path| VhostListener::bind_with(path, permissions))
        .transpose()?;
    let control = args.control.bind()?;
    let metrics = args.metrics.bind()?;
    let manager = service::Manager::find();
    // What only reading files tells is asked before files are out of reach.
    args.queues();
    let image = prepare(&args, &args.image, args.create)?;
    let others = args
        .export
        .prepare_others(|image| prepare(&args, image, None))?;
    let places = places.bind_tcp()?;
    // Not before the image is known to be this process's.
    let pid_file = service::PidFile::write(args.service.pid_file.as_deref())?;
    let connections = descriptors::connections_that_fit(&descriptors::Plan {
        open: descriptors::open_now(),
        images: 1 + others.len() as u64,
        queues: args.queues() as u64,
        nbd: !places.list.is_empty(),
        vhost_user: args.vhost_user.is_some(),
        connections: args.export.max_connections(),
    });
    let made = [
        args.vhost_user.as_deref(),
        args.control.path(),
        args.metrics.path(),
        args.service.pid_file.as_deref(),
    ];
    args.sandbox
        .restrict_files(places.paths(), made.into_iter().flatten())?;
    let device = image.start()?;
    let others = export::start_others(others)?;
    let nbd = args.export.configure(
        Server::builder(device.clone()).queues(args.queues()),
        &others,
        credentials,
    );
    let nbd = nbd.max_connections(connections);
    let servers = Servers::start(&args, &device, (places, permissions), nbd, vhost_listener)?;
    let mut control = control
        .map(|listener| Control::start(listener, controlled(&args, &device, &others)))
        .transpose()?;
    let metrics = metrics
        .map(|listener| Metrics::start(listener, servers.sources(&args, &device, &others)))
        .transpose()?;
    args.sandbox.restrict_calls()?;
    for device in std::iter::once(&device).chain(others.iter().map(|other| &other.device)) {
        tell_of_leaks(device);
    }
    banner::print(&args, &device, &others, &servers, metrics.as_ref());
    manager.ready(&args.image);

    let signal = stop.wait();
    tracing::info!(signal, clients = servers.connections(), "stopping");
    print(&format!("{}: {signal}: finishing\n", args.image.display()));
    manager.stopping();
    // First: servers wait for the requests that a pause holds.
    if let Some(control) = &mut control {
        control.end();
    }
    // Closed whatever becomes of the servers: what clients have written is to be safe.
    let devices = others.iter().map(|other| other.device.clone());
    let patience = Patience::start(devices.chain([device.clone()]).collect());
    let ended = servers.shutdown();
    drop(patience);
    let mut closed = device.close();
    let names: Vec<Device> = others.iter().map(|other| other.device.clone()).collect();
    for other in others {
        // Each is closed; the first error is the one to tell.
        closed = closed.and(other.device.close());
    }
    drop(pid_file);
    closed?;
    ended?;
    names_are_there(&device)?;
    for other in &names {
        names_are_there(other)?;
    }
    let end = if args.snapshot {
        "closed as it was: what was written is gone with the snapshot"
    } else {
        "closed, everything is on disk"
    };
    print(&format!("{}: {end}\n", args.image.display()));
    Ok(ExitCode::SUCCESS)
}

/// Prepares a server for the moment in which memory or descriptors run out.
pub(crate) fn make_room() {
    descriptors::raise_limit();
    if let Err(error) = urus::hold_reserve() {
        tracing::warn!(%error, "no memory can be kept back: if the process runs out of it, it aborts");
    }
}

/// What is durable and has no name is lost all the same.
pub(crate) fn names_are_there(device: &Device) -> Result<(), Failure> {
    let deleted = device.deleted_files();
    let Some(first) = deleted.first() else {
        return Ok(());
    };
    let first = first.display();
    Err(Failure::new(
        if deleted.contains(&&*device.layers()[0].path) {
            format!(
                "{first}: the image was deleted or replaced while it was served: what was written to it since it was opened is lost"
            )
        } else {
            format!(
                "{}: its backing file {first} was deleted or replaced while it was served: the image is on disk, and is incomplete without it",
                device.layers()[0].path.display()
            )
        },
    ))
}

/// Says what a check at opening has found, and what to do about it.
pub(crate) fn tell_of_leaks(device: &Device) {
    let Some(found) = device.found_at_opening() else {
        return;
    };
    let image = device.layers()[0].path.display();
    let bytes = |clusters: u64| {
        crate::size::human(clusters.saturating_mul(device.cluster_bytes().unwrap_or(0)))
    };
    if found.leaks_fixed > 0 {
        let freed = bytes(found.leaks_fixed);
        complain(&format!(
            "urus: {image}: {} leaked clusters given back ({freed})",
            found.leaks_fixed
        ));
    }
    if found.corruptions_fixed > 0 {
        complain(&format!(
            "urus: {image}: {} errors repaired",
            found.corruptions_fixed
        ));
    }
    if found.leaks > 0 {
        let wasted = bytes(found.leaks);
        complain(&format!(
            "urus: {image}: {} clusters ({wasted}) are leaked: allocated, and used by nothing, as a server that was killed may leave them. No \
             data is affected. Give them back with --repair leaks, or with `urus check -r leaks` while the image is not served",
            found.leaks
        ));
    }
    if found.corruptions > 0 {
        complain(&format!(
            "urus: {image}: {} errors were found in the image's metadata: stop the server and run `urus check`",
            found.corruptions
        ));
    }
}

/// What the control socket reaches: every image.
fn controlled(args: &Args, device: &Device, others: &[export::Other]) -> Vec<Controlled> {
    let first = Controlled {
        name: args.export.export_name.clone(),
        device: device.clone(),
    };
    let others = others.iter().map(|other| Controlled {
        name: other.name.clone(),
        device: other.device.clone(),
    });
    std::iter::once(first).chain(others).collect()
}

/// How long an image that is in use may be let go. A process that was killed holds its locks until the kernel has taken its rings apart,
/// which it does in the background.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

fn prepare(args: &Args, image: &Path, size: Option<Size>) -> Result<Prepared, Failure> {
    let options = args.open_options();
    patiently(|| {
        if let Some(Size(size)) = size {
            create(image, args.format.into(), size)?;
        }
        options
            .prepare(image)
            .map_err(|error| with_advice(args, image, error))
    })
}

/// What `urus serve` can do about an image that cannot be opened.
fn with_advice(args: &Args, image: &Path, error: urus::Error) -> OpenError {
    let (operation, kind) = match &error {
        urus::Error::Io {
            operation,
            path,
            source,
        } if path == image => (*operation, source.kind()),
        _ => return OpenError::Urus(error),
    };
    let advice = match kind {
        std::io::ErrorKind::NotFound if operation == "open" => {
            let directory = image.parent().filter(|dir| !dir.as_os_str().is_empty());
            match directory.filter(|dir| !dir.exists()) {
                Some(dir) => format!("there is no directory {}", dir.display()),
                None if image == args.image => "--create SIZE makes it (--create 8G)".into(),
                None => "urus create makes one".into(),
            }
        }
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            if operation == "open" && !args.read_only =>
        {
            "-r serves it for reading only, --snapshot with writes that are not kept".into()
        }
        _ => return OpenError::Urus(error),
    };
    OpenError::Other(Failure::from(error).or(&advice))
}

/// Opens an image's files, which a server that was killed just now may still hold.
pub(crate) fn patiently(
    attempt: impl Fn() -> Result<Prepared, OpenError>,
) -> Result<Prepared, Failure> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(OpenError::Urus(urus::Error::InUse { .. })) if begin.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(prepared) => return Ok(prepared),
            Err(OpenError::Urus(error)) => return Err(error.into()),
            Err(OpenError::Other(failure)) => return Err(failure),
        }
    }
}

/// Why an image cannot be served: to tell the one reason that may pass.
pub(crate) enum OpenError {
    Urus(urus::Error),
    Other(Failure),
}

impl From<urus::Error> for OpenError {
    fn from(error: urus::Error) -> Self {
        Self::Urus(error)
    }
}

/// What serves the image.
struct Servers {
    nbd: Option<Server>,
    vhost_user: Option<VhostServer>,
}

impl Servers {
    fn start(
        args: &Args,
        device: &Device,
        (places, permissions): (Places, Permissions),
        mut nbd: ServerBuilder,
        vhost_listener: Option<VhostListener>,
    ) -> Result<Self, Failure> {
        let mut servers = Self {
            nbd: None,
            vhost_user: None,
        };
        if !places.list.is_empty() {
            for listener in places.bind(permissions)? {
                nbd = nbd.listener(listener);
            }
            servers.nbd = Some(nbd.start()?);
        }
        if let Some(listener) = vhost_listener {
            let builder = VhostServer::builder(device.clone(), listener)
                .queues(args.queues())
                .serial(&args.serial)
                .volatile_cache(args.volatile_cache)
                .pin_guest_memory(args.pin_guest_memory)
                .poll(Duration::from_micros(args.poll_us));
            servers.vhost_user = Some(builder.start()?);
        }
        Ok(servers)
    }

    /// What metrics are given of: every image, and what serves them.
    fn sources(&self, args: &Args, device: &Device, others: &[export::Other]) -> Sources {
        Sources {
            images: controlled(args, device, others),
            nbd: self.nbd.as_ref().map(Server::monitor),
            vhost_user: self.vhost_user.as_ref().map(VhostServer::monitor),
        }
    }

    fn connections(&self) -> usize {
        self.nbd.as_ref().map_or(0, Server::connections)
    }

    fn shutdown(self) -> Result<(), Failure> {
        let vhost_user = self.vhost_user.map_or(Ok(()), VhostServer::shutdown);
        let nbd = self.nbd.map_or(Ok(()), Server::shutdown);
        vhost_user?;
        Ok(nbd?)
    }
}

/// Creates the image, also in the place of an empty file, or sees that the one that is there has the size.
fn create(image: &Path, format: Format, size: u64) -> Result<(), OpenError> {
    // What is neither is judged by opening it.
    let is_file_to_make = match image.metadata() {
        Ok(there) => there.is_file() && there.len() == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    if is_file_to_make {
        let mut options = CreateOptions::new();
        options.format(format).size(size).replace_empty();
        match urus::create(image, &options) {
            Ok(()) => {
                tracing::info!(size, "created");
                return Ok(());
            }
            // Another process was faster.
            Err(urus::Error::Io { source, .. })
                if source.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    let there = urus::info(image, InfoOptions::new().format(format))?.virtual_size;
    // As creating it would.
    if there != size.next_multiple_of(512) {
        return Err(OpenError::Other(Failure::new(format!(
            "{}: exists with a size of {} ({there} bytes), and --create asks for {size} bytes; leave --create away to serve it as it is",
            image.display(),
            crate::size::human(there)
        ))));
    }
    Ok(())
}

/// A place to listen at.
enum Place {
    To(Listen),
    Bound(Listener),
}

/// Where to listen.
struct Places {
    list: Vec<Place>,
    /// The only place is the socket beside the image, which nobody has chosen.
    is_default: bool,
}

impl Places {
    fn of(args: &Args) -> Result<Self, Failure> {
        let passed = export::passed_sockets()?;
        let mut others: Vec<Listen> = args.sockets.addresses().collect();
        let chosen = !args.nbd.is_empty() || !passed.is_empty() || !others.is_empty();
        if !chosen && args.vhost_user.is_some() {
            return Ok(Self {
                list: Vec::new(),
                is_default: false,
            });
        }
        if !chosen {
            return Ok(Self {
                list: vec![Place::To(Listen::Unix(default_socket(&args.image)))],
                is_default: true,
            });
        }
        let mut list = passed;
        list.append(&mut others);
        for text in &args.nbd {
            let place = text
                .parse()
                .map_err(|error: urus_listen::Error| Failure::usage(format!("--nbd: {error}")))?;
            list.push(place);
        }
        let mut hosts: Vec<&str> = Vec::new();
        for place in &list {
            let Listen::Tcp(address) = place else {
                continue;
            };
            if hosts.contains(&address.as_str()) && !address.ends_with(":0") {
                return Err(Failure::usage(format!(
                    "--nbd: {address} is given twice; give each address once"
                )));
            }
            hosts.push(address);
        }
        let list = list.into_iter().map(Place::To).collect();
        Ok(Self {
            list,
            is_default: false,
        })
    }

    /// Refuses a path that is taken before anything is opened or created. The sockets themselves are made last: that they are there
    /// tells that the server is ready.
    fn look(&self) -> Result<(), Failure> {
        for place in &self.list {
            let Place::To(Listen::Unix(path)) = place else {
                continue;
            };
            if path.symlink_metadata().is_err() {
                continue;
            }
            match Listener::bind(Listen::Unix(path.clone())) {
                // Replaced when its time has come.
                Err(urus_listen::Error::SocketStale { .. }) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Listens where no file tells that the server is ready: looking up a host's name reads files, which is over soon.
    fn bind_tcp(mut self) -> Result<Self, Failure> {
        let bind = |place| match place {
            Place::To(listen) if !matches!(listen, Listen::Unix(_)) => {
                Ok(Place::Bound(Listener::bind(listen)?))
            }
            place => Ok(place),
        };
        let bound: Result<_, Failure> = self.list.into_iter().map(bind).collect();
        self.list = bound?;
        Ok(self)
    }

    /// The paths of sockets to be made.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        self.list.iter().filter_map(|place| match place {
            Place::To(Listen::Unix(path)) => Some(path.as_path()),
            _ => None,
        })
    }

    fn bind(self, permissions: Permissions) -> Result<Vec<Listener>, Failure> {
        let mut listeners = Vec::new();
        for place in self.list {
            listeners.push(match place {
                Place::To(Listen::Unix(path)) if self.is_default => {
                    bind_default(path, permissions)?
                }
                Place::To(listen) => Listener::bind_with(listen, permissions, true)?,
                Place::Bound(listener) => listener,
            });
        }
        Ok(listeners)
    }
}

fn default_socket(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".nbd.sock");
    path.into()
}

/// The socket beside the image, whose name nobody has chosen.
fn bind_default(path: PathBuf, permissions: Permissions) -> Result<Listener, Failure> {
    match Listener::bind_with(Listen::Unix(path), permissions, true) {
        Err(error @ urus_listen::Error::SocketPathTooLong { .. }) => {
            Err(Failure::complete(format!("{error} with --nbd unix:PATH")))
        }
        // The image's directory may be for reading only.
        Err(error @ urus_listen::Error::Listen { .. }) => {
            Err(Failure::from(error).or("choose another place for the socket with --nbd unix:PATH"))
        }
        result => Ok(result?),
    }
}

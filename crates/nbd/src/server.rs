//! The server: its threads, and how it starts and ends.
//!
//! One thread accepts clients and hands each to the worker that has fewest; the workers do everything else.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, sockopt};
use tracing::{Span, debug, error, info, info_span, warn};
use urus::{Device, QueueSeat};
use urus_listen::{Acceptor, Address, Listen, Listener, Seldom, Stopper};

use crate::Error;
use crate::complaints::peer;
use crate::connection::{Permit, Times};
use crate::export::{Export, Exports};
use crate::limits::{
    CONNECTIONS, DRAIN_TIME, HANDSHAKE_TIME, QUEUES, SOCKET_BUFFER_BYTES, STATUS_STEP_CLUSTERS,
    STATUS_STEP_MIN_BYTES, STRING_BYTES,
};
use crate::tls::TlsCredentials;
use crate::uri::uri;
use crate::worker::{Inbox, Message, Worker};

/// What to serve, and how. Made by [`Server::builder`].
#[derive(Debug)]
pub struct ServerBuilder {
    /// At least one; the first is the default.
    exports: Vec<Offer>,
    tls: Option<TlsCredentials>,
    queues: usize,
    listen: Vec<Listen>,
    listeners: Vec<Listener>,
    max_connections: usize,
    ring_sockets: bool,
    times: Times,
}

/// A device to be an export.
#[derive(Debug)]
struct Offer {
    device: Device,
    name: String,
    description: Option<String>,
}

impl Offer {
    fn new(device: Device) -> Self {
        Self {
            device,
            name: String::new(),
            description: None,
        }
    }
}

impl ServerBuilder {
    /// One more export: what [`export_name`](Self::export_name) and [`description`](Self::description) say next is about this one.
    #[must_use]
    pub fn export(mut self, device: Device) -> Self {
        self.exports.push(Offer::new(device));
        self
    }

    fn last(&mut self) -> &mut Offer {
        self.exports.last_mut().expect("begins with one")
    }

    /// The name that clients ask for, at most 4096 bytes and of no other export. The default is the empty name, and whatever its name,
    /// clients that ask for none get the first export too.
    #[must_use]
    pub fn export_name(mut self, name: impl Into<String>) -> Self {
        self.last().name = name.into();
        self
    }

    /// What clients may show to people about the export, at most 4096 bytes.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.last().description = Some(description.into());
        self
    }

    /// Tell and serve exports over TLS only. Clients begin in the clear and ask for it (STARTTLS), as `nbds://` says.
    #[must_use]
    pub fn tls(mut self, credentials: TlsCredentials) -> Self {
        self.tls = Some(credentials);
        self
    }

    /// Queues, each with its own thread: 1 (default) to 256. Connections are spread over them.
    #[must_use]
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Where to listen, bound by [`start`](Self::start). Can be given several times.
    #[must_use]
    pub fn listen(mut self, listen: Listen) -> Self {
        self.listen.push(listen);
        self
    }

    /// Sockets that listen already. Can be given several times.
    #[must_use]
    pub fn listener(mut self, listener: Listener) -> Self {
        self.listeners.push(listener);
        self
    }

    /// Connections at once (default 128). One more is closed as soon as it is accepted. Each can hold 64 MiB of payload.
    #[must_use]
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = connections;
        self
    }

    /// Whether the rings of the queues do the work on the sockets too, or epoll says when a system call can (the default is the rings). With TLS, and where
    /// there is no ring, it is always epoll.
    #[must_use]
    pub fn ring_sockets(mut self, ring: bool) -> Self {
        self.ring_sockets = ring;
        self
    }

    /// How long a client may take to choose an export (default 30 s).
    #[must_use]
    pub fn handshake_time(mut self, time: Duration) -> Self {
        self.times.handshake = time;
        self
    }

    /// How long a client may take for its last replies when its connection ends, above all on [`Server::shutdown`] (default 10 s).
    #[must_use]
    pub fn drain_time(mut self, time: Duration) -> Self {
        self.times.drain = time;
        self
    }

    /// Starts to serve.
    ///
    /// # Errors
    /// What stands against listening, or a device or system that gives no queue or thread. Nothing runs then.
    pub fn start(self) -> Result<Server, Error> {
        self.check()?;
        let mut listeners = self.listeners;
        for listen in self.listen {
            listeners.push(Listener::bind(listen)?);
        }
        let span = info_span!("nbd", image = images(&self.exports));
        let _entered = span.enter();
        let seats = (0..self.queues)
            .map(|_| {
                let queues = self.exports.iter().map(|export| export.device.queue());
                let mut queues = queues.collect::<Result<Vec<_>, _>>()?;
                if self.ring_sockets {
                    // A worker sleeps in one ring.
                    let first = queues.remove(0).with_sockets();
                    queues.insert(0, first);
                }
                Ok(queues)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let export_name = self.exports[0].name.clone();
        let exports = Arc::new(Exports::new(
            self.exports.into_iter().map(export).collect(),
            self.tls.map(|tls| tls.config),
        ));

        let mut server = Server {
            addresses: listeners
                .iter()
                .flat_map(Listener::addresses)
                .cloned()
                .collect(),
            export_name,
            tls: exports.tls().is_some(),
            connections: Arc::default(),
            acceptor: None,
            workers: Vec::new(),
            span: span.clone(),
        };
        // Dropped on failure, the server stops the workers that have started.
        server.start_workers(seats, &exports, self.times)?;
        server.start_acceptor(listeners, self.max_connections)?;
        for address in &server.addresses {
            info!(%address, export = server.export_name, "listening");
        }
        Ok(server)
    }

    fn check(&self) -> Result<(), Error> {
        let invalid = |what: String| Err(Error::Invalid { what });
        if self.listen.is_empty() && self.listeners.is_empty() {
            return invalid("an NBD server needs an address to listen on".into());
        }
        if !(1..=QUEUES).contains(&self.queues) {
            return invalid(format!(
                "{} queues: an NBD server can have 1 to {QUEUES}",
                self.queues
            ));
        }
        for (index, export) in self.exports.iter().enumerate() {
            let description = export.description.as_ref().map_or(0, String::len);
            let longest = export.name.len().max(description);
            if longest > STRING_BYTES {
                return invalid(format!(
                    "an export's name or description has {longest} bytes; NBD allows {STRING_BYTES}"
                ));
            }
            let name = &export.name;
            if self.exports[..index]
                .iter()
                .any(|other| other.name == *name)
            {
                return invalid(format!(
                    "two exports have the name {name:?}; each needs one of its own"
                ));
            }
        }
        Ok(())
    }
}

/// What the log calls them.
fn images(offers: &[Offer]) -> String {
    let names: Vec<_> = offers.iter().map(|offer| offer.device.name()).collect();
    names.join(", ")
}

fn export(offer: Offer) -> Export {
    let Offer {
        device,
        name,
        description,
    } = offer;
    let step = device.cluster_bytes().map_or(0, |cluster_bytes| {
        cluster_bytes.saturating_mul(STATUS_STEP_CLUSTERS)
    });
    let sized = device.clone();
    let mut export = Export::new(name, device.read_only(), move || sized.size());
    export.layers = u32::try_from(device.layers().len()).unwrap_or(u32::MAX);
    export.fast_zero = Box::new(move |offset, len, unmap| device.zeroes_fast(offset, len, unmap));
    export.description = description;
    export.status_step_bytes = step.max(STATUS_STEP_MIN_BYTES);
    export
}

/// A running NBD server.
///
/// Dropping it is a [`shutdown`](Self::shutdown) whose outcome is only logged.
pub struct Server {
    addresses: Vec<Address>,
    /// Of the first export.
    export_name: String,
    tls: bool,
    connections: Arc<AtomicUsize>,
    acceptor: Option<(Stopper, JoinHandle<()>)>,
    workers: Vec<RunningWorker>,
    span: Span,
}

struct RunningWorker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<Result<(), Errno>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("addresses", &self.addresses)
            .field("export_name", &self.export_name)
            .field("queues", &self.workers.len())
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

/// What is to be seen of a [`Server`], from any thread, for as long as one likes.
#[derive(Clone, Debug)]
pub struct Monitor {
    connections: Arc<AtomicUsize>,
}

impl Monitor {
    /// Clients connected at this moment.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }
}

impl Server {
    /// A server of `device`, to be configured.
    #[must_use]
    pub fn builder(device: Device) -> ServerBuilder {
        ServerBuilder {
            exports: vec![Offer::new(device)],
            tls: None,
            queues: 1,
            listen: Vec::new(),
            listeners: Vec::new(),
            max_connections: CONNECTIONS,
            ring_sockets: true,
            times: Times {
                handshake: HANDSHAKE_TIME,
                drain: DRAIN_TIME,
            },
        }
    }

    /// The addresses listened on, with the ports that are really used.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// An NBD URI of the first export for each address that has one.
    #[must_use]
    pub fn uris(&self) -> Vec<String> {
        self.addresses
            .iter()
            .filter_map(|address| uri(address, &self.export_name, self.tls))
            .collect()
    }

    /// Clients connected at this moment.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// To see how it is doing from elsewhere.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        Monitor {
            connections: Arc::clone(&self.connections),
        }
    }

    /// Ends the server: takes no more clients and removes its socket files, refuses requests that were received but not started
    /// (`ESHUTDOWN`), finishes those in flight, sends the replies, closes all connections, and ends its threads. Clients that do not take
    /// their replies are waited for as [`drain_time`](ServerBuilder::drain_time) says, the device as long as it takes.
    ///
    /// Nothing is flushed by this: a client that wanted its writes durable has flushed, and [`Device::close`] makes
    /// everything durable.
    ///
    /// # Errors
    /// [`Error::ThreadFailed`] when a thread had failed before.
    pub fn shutdown(mut self) -> Result<(), Error> {
        self.end()
    }

    fn start_workers(
        &mut self,
        seats: Vec<Vec<QueueSeat>>,
        exports: &Arc<Exports>,
        times: Times,
    ) -> Result<(), Error> {
        let (started, results) = mpsc::channel();
        for (index, seats) in seats.into_iter().enumerate() {
            let inbox = Inbox::new().map_err(|error| Error::system("make an eventfd", error))?;
            let (started, exports, span) =
                (started.clone(), Arc::clone(exports), self.span.clone());
            let ours = Arc::clone(&inbox);
            let work = move || {
                let _entered = span.enter();
                run_worker(ours, seats, exports, times, &started)
            };
            let thread = std::thread::Builder::new()
                .name(format!("urus-nbd-{index}"))
                .spawn(work)
                .map_err(|error| Error::system("start a thread", error))?;
            self.workers.push(RunningWorker { inbox, thread });
        }
        drop(started);
        for _ in &self.workers {
            results.recv().map_err(|_| Error::ThreadFailed)??;
        }
        Ok(())
    }

    fn start_acceptor(
        &mut self,
        listeners: Vec<Listener>,
        max_connections: usize,
    ) -> Result<(), Error> {
        let (acceptor, stopper) = Acceptor::new(listeners)?;
        let reception = Reception {
            acceptor,
            inboxes: self
                .workers
                .iter()
                .map(|worker| Arc::clone(&worker.inbox))
                .collect(),
            connections: Arc::clone(&self.connections),
            max_connections,
            next_id: 0,
            full: Seldom::default(),
        };
        let span = self.span.clone();
        let thread = std::thread::Builder::new()
            .name("urus-nbd-accept".into())
            .spawn(move || {
                let _entered = span.enter();
                reception.run();
            })
            .map_err(|error| Error::system("start a thread", error))?;
        self.acceptor = Some((stopper, thread));
        Ok(())
    }

    /// Stops all threads and waits for them. Doing it again does nothing.
    fn end(&mut self) -> Result<(), Error> {
        let span = self.span.clone();
        let _entered = span.enter();
        let mut result = Ok(());
        if let Some((stopper, thread)) = self.acceptor.take() {
            stopper.stop();
            if thread.join().is_err() {
                result = Err(Error::ThreadFailed);
            }
        }
        for worker in &self.workers {
            worker.inbox.send(Message::Stop);
        }
        for worker in self.workers.drain(..) {
            match worker.thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => result = Err(Error::ThreadFailed),
            }
        }
        result
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            error!(%error, "the NBD server did not end well");
        }
    }
}

/// The life of a worker's thread. Says through `started` whether it could begin.
fn run_worker(
    inbox: Arc<Inbox>,
    seats: Vec<QueueSeat>,
    exports: Arc<Exports>,
    times: Times,
    started: &mpsc::Sender<Result<(), Error>>,
) -> Result<(), Errno> {
    /// Closes the inbox when the thread ends, in whatever way.
    struct Closing(Arc<Inbox>);
    impl Drop for Closing {
        fn drop(&mut self) {
            self.0.close();
        }
    }
    let _closing = Closing(Arc::clone(&inbox));
    let worker = seats
        .into_iter()
        .map(QueueSeat::activate)
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::from)
        .and_then(|queues| Worker::new(inbox, exports, queues, times));
    match worker {
        Ok(worker) => {
            let _ = started.send(Ok(()));
            worker
                .run()
                .inspect_err(|error| error!(%error, "a worker of the NBD server has failed"))
        }
        Err(error) => {
            let _ = started.send(Err(error));
            Ok(())
        }
    }
}

/// Takes clients, and says which worker has each.
struct Reception {
    acceptor: Acceptor,
    inboxes: Vec<Arc<Inbox>>,
    connections: Arc<AtomicUsize>,
    max_connections: usize,
    next_id: u64,
    /// The last client was turned away.
    full: Seldom,
}

impl Reception {
    fn run(mut self) {
        while let Some(socket) = self.acceptor.accept() {
            self.admit(socket);
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        let id = self.next_id;
        self.next_id += 1;
        if self.connections.load(Relaxed) >= self.max_connections {
            if let Some(unmentioned) = self.full.due() {
                warn!(
                    limit = self.max_connections,
                    unmentioned, "as many clients as are allowed; more are turned away"
                );
            }
            return;
        }
        let peer = prepare(&socket);
        let fewest = self
            .inboxes
            .iter()
            .filter(|inbox| inbox.is_open())
            .min_by_key(|inbox| inbox.connections.load(Relaxed));
        let Some(inbox) = fewest else {
            error!("no worker is left; the client is turned away");
            return;
        };
        debug!(connection = id, peer, "a client has connected");
        let permit = Permit::new([
            Arc::clone(&self.connections),
            Arc::clone(&inbox.connections),
        ]);
        inbox.send(Message::Client { id, socket, permit });
    }
}

/// Sets what a connection's socket needs, as far as it goes, and says who the client is.
fn prepare(socket: &OwnedFd) -> String {
    if sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX) {
        // The default of some 200 KiB makes large transfers stutter.
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES);
        return peer(socket);
    }
    let _ = sockopt::set_tcp_nodelay(socket, true);
    // A client whose machine is gone must not hold its place for ever.
    let _ = sockopt::set_socket_keepalive(socket, true);
    peer(socket)
}

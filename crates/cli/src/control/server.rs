//! Doing what is asked over the control socket.
//!
//! One thread takes connections, each has one of its own, of which there are few. Commands that change something come one after the
//! other; nothing else waits for them, least of all the disk's requests.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracing::{debug, info, warn};
use urus::{Device, PauseOptions, QueueStatistics};
use urus_listen::{Acceptor, Listener, Stopper};

use super::protocol::{
    Command, Kind, Lines, Outcome, Problem, REQUEST_BYTES, Reply, Request, VERSION, write_line,
};
use crate::failure::Failure;

/// Connections at once; more are turned away.
const CONNECTIONS: usize = 8;

/// Descriptors kept back for the moment in which there are no others: enough for two connections.
const SPARE: usize = 4;

/// How long a connection may take for its next request, and for taking a reply.
const IDLE_TIME: Duration = Duration::from_secs(60);
const WRITE_TIME: Duration = Duration::from_secs(5);

/// An image that can be controlled.
#[derive(Clone, Debug)]
pub(crate) struct Controlled {
    /// Its export's name.
    pub(crate) name: String,
    pub(crate) device: Device,
}

/// A control socket that takes commands. Dropping it is [`end`](Self::end).
pub(crate) struct Control {
    shared: Arc<Shared>,
    stopper: Stopper,
    reception: Option<JoinHandle<()>>,
}

struct Shared {
    /// At least one; the first is meant where no name is given.
    images: Vec<Controlled>,
    /// Held by the command that changes something.
    turn: Mutex<()>,
    /// No more commands are taken.
    ending: AtomicBool,
    connections: Mutex<HashMap<u64, Connection>>,
}

struct Connection {
    /// Shared with the thread, so that a connection takes one descriptor.
    stream: Arc<UnixStream>,
    /// None until its owner has put it there; the thread itself takes nothing from it.
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub(crate) fn start(listener: Listener, images: Vec<Controlled>) -> Result<Self, Failure> {
        let (acceptor, stopper) = Acceptor::new(vec![listener])?;
        let acceptor = acceptor.with_spare(SPARE);
        let shared = Arc::new(Shared {
            images,
            turn: Mutex::default(),
            ending: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        let reception = std::thread::Builder::new()
            .name("urus-control".into())
            .spawn(move || receive(&theirs, acceptor))
            .map_err(|error| Failure::new(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            shared,
            stopper,
            reception: Some(reception),
        })
    }

    /// Takes no more commands, waits for the one under way and its reply, and lets every paused image go on, since servers that are to
    /// end wait for the requests that a pause holds. An image that cannot go on, because another process has it now, is closed:
    /// what it holds fails.
    pub(crate) fn end(&mut self) {
        let Some(reception) = self.reception.take() else {
            return;
        };
        self.shared.ending.store(true, Ordering::SeqCst);
        self.stopper.stop();
        if reception.join().is_err() {
            warn!("the control socket's thread has panicked");
        }
        drop(self.shared.turn());
        for connection in lock(&self.shared.connections).values() {
            // Only what comes: a reply is still to go.
            let _ = connection.stream.shutdown(Shutdown::Read);
        }
        loop {
            let mut connections = lock(&self.shared.connections);
            let thread = connections
                .values_mut()
                .find_map(|connection| connection.thread.take());
            drop(connections);
            let Some(thread) = thread else { break };
            let _ = thread.join();
        }
        for Controlled { name, device } in &self.shared.images {
            if let Err(error) = device.resume() {
                warn!(name, %error, "cannot go on after the pause; what waits fails");
                // Its error comes again when the server closes it.
                let _ = device.close();
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes connections until it is enough.
fn receive(shared: &Arc<Shared>, mut acceptor: Acceptor) {
    let mut next_id = 0;
    while let Some(socket) = acceptor.accept() {
        let id = next_id;
        next_id += 1;
        if let Err(error) = admit(shared, id, socket.into()) {
            debug!(%error, "a control connection was not to be had");
        }
    }
}

fn admit(shared: &Arc<Shared>, id: u64, stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(WRITE_TIME))?;
    let mut connections = lock(&shared.connections);
    if connections.len() >= CONNECTIONS {
        drop(connections);
        let message = format!(
            "{CONNECTIONS} control connections are open already; close one of them, or try again"
        );
        return answer(&stream, Err(Problem::new(Kind::Busy, message)));
    }
    let stream = Arc::new(stream);
    let connection = Connection {
        stream: Arc::clone(&stream),
        thread: None,
    };
    connections.insert(id, connection);
    let theirs = Arc::clone(shared);
    // While the connections are locked: the thread that ends at once finds its own.
    let spawned = std::thread::Builder::new()
        .name("urus-control".into())
        .spawn(move || serve(&theirs, id, &stream));
    match spawned {
        Ok(thread) => {
            if let Some(connection) = connections.get_mut(&id) {
                connection.thread = Some(thread);
            }
            Ok(())
        }
        Err(error) => {
            connections.remove(&id);
            Err(error)
        }
    }
}

/// The life of a connection's thread.
fn serve(shared: &Shared, id: u64, stream: &UnixStream) {
    /// Gives the place back, in whatever way the thread ends.
    struct Place<'a>(&'a Shared, u64);
    impl Drop for Place<'_> {
        fn drop(&mut self) {
            lock(&self.0.connections).remove(&self.1);
        }
    }
    let _place = Place(shared, id);
    if let Err(error) = shared.converse(stream) {
        debug!(connection = id, %error, "a control connection has ended");
    }
}

fn answer(mut stream: &UnixStream, result: Result<Value, Problem>) -> io::Result<()> {
    let outcome = match result {
        Ok(value) => Outcome::Result(value),
        Err(problem) => Outcome::Error(problem),
    };
    let version = VERSION;
    write_line(&mut stream, &Reply { version, outcome })
}

impl Shared {
    fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    fn converse(&self, mut stream: &UnixStream) -> io::Result<()> {
        let mut lines = Lines::new(REQUEST_BYTES);
        loop {
            let begin = Instant::now();
            let line = loop {
                if let Some(line) = lines.take() {
                    break line;
                }
                // For the whole of a request, however it trickles in.
                let left = IDLE_TIME.saturating_sub(begin.elapsed());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                stream.set_read_timeout(Some(left))?;
                match lines.fill(&mut stream) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        let problem = Problem::new(Kind::Request, error.to_string());
                        return answer(stream, Err(problem));
                    }
                    Err(error) => return Err(error),
                }
            };
            let result = Request::parse(&line).and_then(|request| self.perform(&request));
            answer(stream, result)?;
        }
    }

    fn perform(&self, request: &Request) -> Result<Value, Problem> {
        let image = self.image(request.image.as_deref())?;
        if request.command == (Command::Stats {}) {
            return Ok(stats(image));
        }
        let _turn = self.turn();
        if self.ending.load(Ordering::SeqCst) {
            return Err(Problem::new(Kind::Busy, "the server is ending"));
        }
        let device = &image.device;
        info!(image = device.name(), command = ?request.command, "asked for over the control socket");
        let done = match request.command {
            // The turn is held: nothing changes the size between this look at it and the change.
            Command::Resize(new) => {
                let size = new.resolve(device.size()).ok_or_else(|| {
                    let message = format!(
                        "{}: no disk can be that large: it has {} bytes already",
                        device.name(),
                        device.size()
                    );
                    Problem::new(Kind::Device, message)
                })?;
                device.resize(size)
            }
            Command::Pause { release_locks } => {
                device.pause(PauseOptions::new().release_locks(release_locks))
            }
            Command::Resume {} => device.resume(),
            Command::Flush {} => device.flush(),
            Command::Stats {} => Ok(()),
        };
        done.map_err(|error| Problem::new(Kind::Device, error.to_string()))?;
        Ok(match request.command {
            Command::Resize(_) => json!({"size": device.size()}),
            _ => json!({}),
        })
    }

    fn image(&self, name: Option<&str>) -> Result<&Controlled, Problem> {
        let Some(name) = name else {
            return Ok(&self.images[0]);
        };
        let found = self.images.iter().find(|image| image.name == name);
        found.ok_or_else(|| {
            let names: Vec<_> = self
                .images
                .iter()
                .map(|image| format!("'{}'", image.name))
                .collect();
            let message = format!(
                "no image is exported as '{name}'; there are {}",
                names.join(", ")
            );
            Problem::new(Kind::Image, message)
        })
    }
}

/// What a device is, and has done.
fn stats(image: &Controlled) -> Value {
    let device = &image.device;
    let statistics = device.statistics();
    let counters = &statistics.counters;
    let queues: Vec<Value> = statistics.queues.iter().map(queue).collect();
    json!({
        "image": device.name(),
        "export": image.name,
        "format": device.format().to_string(),
        "size": statistics.size,
        "read-only": statistics.read_only,
        "paused": statistics.paused,
        "poisoned": statistics.poisoned,
        "driver": statistics.driver,
        "layers": statistics.chain_depth,
        "commits": counters.commits,
        "barriers": counters.barriers,
        "allocated-clusters": counters.allocated_clusters,
        "freed-clusters": counters.freed_clusters,
        "copied-bytes": counters.copied_bytes,
        "mapping-hits": counters.mapping_hits,
        "slice-loads": counters.slice_loads,
        "evicted-slices": counters.evicted_slices,
        "decoded-hits": counters.decoded_hits,
        "decoded-clusters": counters.decoded_clusters,
        "queues": queues,
    })
}

/// A queue, with the kinds of operation that it has seen. (Latencies are a matter of metrics.)
fn queue(queue: &QueueStatistics) -> Value {
    let mut fields = serde_json::Map::new();
    fields.insert("driver".into(), queue.driver.into());
    fields.insert("in-flight".into(), queue.in_flight.into());
    for (kind, seen) in queue.by_kind() {
        if seen.operations + seen.errors > 0 {
            let numbers =
                json!({"operations": seen.operations, "bytes": seen.bytes, "errors": seen.errors});
            fields.insert(kind.replace('_', "-"), numbers);
        }
    }
    fields.into()
}

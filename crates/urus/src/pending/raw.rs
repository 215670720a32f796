use super::error::{Error, Result};
use super::request::*;
use std::collections::VecDeque;
use std::sync::{
    Condvar, Mutex as StdMutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::Duration;
use urus_engine::storage::*;
use urus_engine::sync::Arc;
use urus_format::{Geometry, Header};

#[derive(Debug)]
pub struct LayerSpec {
    pub file: FileId,
    pub name: String,
    pub format: LayerFormat,
}
#[derive(Debug)]
pub enum LayerFormat {
    Raw,
    Qcow2(Box<Header>),
}
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    pub read_only: bool,
    pub l2_cache_bytes: u64,
    pub discard: bool,
}
impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            l2_cache_bytes: 64 << 20,
            discard: true,
        }
    }
}
pub type ControlReply = Box<dyn FnOnce(Result<()>) + Send>;
#[non_exhaustive]
pub enum Control {
    Flush(ControlReply),
    Pause(ControlReply),
    Resume(Option<Box<Header>>, ControlReply),
    Resize(u64, ControlReply),
    Close(ControlReply),
}
pub struct Shared {
    size: AtomicU64,
    geometry: Option<Geometry>,
    read_only: bool,
    mail: StdMutex<VecDeque<Control>>,
    cv: Condvar,
    closed: AtomicBool,
}
impl Shared {
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    pub fn geometry(&self) -> Option<Geometry> {
        self.geometry
    }
    pub fn control(&self, control: Control) {
        self.mail.lock().unwrap().push_back(control);
        self.cv.notify_all();
    }
}
pub struct Maintenance<S: Storage> {
    shared: Arc<Shared>,
    storage: S,
    regular: bool,
}
impl<S: Storage> Maintenance<S> {
    pub fn open(storage: S, layers: Vec<LayerSpec>, options: Options) -> Result<Self> {
        let (size, geometry) = match &layers[0].format {
            LayerFormat::Raw => (storage.file_len(IMAGE).unwrap(), None),
            LayerFormat::Qcow2(h) => (h.size, Some(h.geometry())),
        };
        let regular = storage.properties(IMAGE).regular;
        Ok(Self {
            shared: Arc::new(Shared {
                size: AtomicU64::new(size),
                geometry,
                read_only: options.read_only,
                mail: StdMutex::default(),
                cv: Condvar::new(),
                closed: AtomicBool::new(false),
            }),
            storage,
            regular,
        })
    }
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
    fn op(&mut self, kind: OpKind<S::Memory>) -> Result<()> {
        let _ = self.storage.submit(Op { file: IMAGE, kind }, 0);
        self.storage.kick();
        loop {
            if let Some(c) = self.storage.complete() {
                return c.result.map(drop).map_err(|e| Error::Io {
                    operation: "op",
                    file: "image".into(),
                    offset: 0,
                    bytes: 0,
                    errno: e.raw_os_error().unwrap_or(5),
                });
            }
            self.storage.wait(None);
        }
    }
    pub fn run(&mut self) {
        let shared = self.shared();
        let _ = self.regular;
        loop {
            let next = {
                let mut mail = shared.mail.lock().unwrap();
                loop {
                    match mail.pop_front() {
                        Some(c) => break c,
                        None if shared.closed.load(Ordering::Acquire) => return,
                        None => mail = shared.cv.wait(mail).unwrap(),
                    }
                }
            };
            match next {
                Control::Flush(reply) | Control::Pause(reply) => {
                    let r = self.op(OpKind::SyncData);
                    reply(r)
                }
                Control::Resume(_, reply) => reply(Ok(())),
                Control::Resize(n, reply) => {
                    let r = self.op(OpKind::SetLen { len: n });
                    if r.is_ok() {
                        shared.size.store(n, Ordering::Release);
                    }
                    reply(r)
                }
                Control::Close(reply) => {
                    let r = self.op(OpKind::SyncData);
                    shared.closed.store(true, Ordering::Release);
                    reply(r)
                }
            }
        }
    }
}
struct Flight<M> {
    token: u64,
    memory: Option<M>,
    extents: Vec<Extent>,
}
pub struct Queue<S: Storage> {
    shared: Arc<Shared>,
    storage: S,
    depth: usize,
    flights: slab::Slab<Flight<S::Memory>>,
    done: VecDeque<Reply<S::Memory>>,
}
impl<S: Storage> Queue<S> {
    pub fn new(shared: Arc<Shared>, storage: S, depth: usize) -> Self {
        Self {
            shared,
            storage,
            depth,
            flights: slab::Slab::new(),
            done: VecDeque::new(),
        }
    }
    pub fn submit(&mut self, request: Request<S::Memory>) -> Result<(), Request<S::Memory>> {
        if self.in_flight() >= self.depth {
            return Err(request);
        }
        let token = request.token;
        let size = self.shared.size();
        let (offset, len, write) = match &request.kind {
            RequestKind::Read { offset, memory } => (*offset, memory.len() as u64, false),
            RequestKind::Write { offset, memory, .. } => (*offset, memory.len() as u64, true),
            RequestKind::Discard { offset, len } | RequestKind::WriteZeroes { offset, len, .. } => {
                (*offset, *len, true)
            }
            RequestKind::BlockStatus { offset, len } => (*offset, *len, false),
            RequestKind::Flush => (0, 0, false),
        };
        let error = if self.shared.closed.load(Ordering::Acquire) {
            Some(Error::Closed)
        } else if offset + len > size {
            Some(Error::OutOfRange { offset, len, size })
        } else if write && self.shared.read_only {
            Some(Error::ReadOnly)
        } else {
            None
        };
        let (memory, kind) = match request.kind {
            RequestKind::Read { offset, memory } => {
                (Some(memory.clone()), OpKind::Read { offset, memory })
            }
            RequestKind::Write {
                offset,
                memory,
                fua,
            } => (
                Some(memory.clone()),
                OpKind::Write {
                    offset,
                    memory,
                    sync: fua,
                },
            ),
            RequestKind::Discard { offset, len } => (None, OpKind::Punch { offset, len }),
            RequestKind::WriteZeroes { offset, len, .. } => (None, OpKind::Punch { offset, len }),
            RequestKind::Flush => (None, OpKind::SyncData),
            RequestKind::BlockStatus { offset, len } => {
                let extents = vec![Extent {
                    start: offset,
                    len,
                    depth: 0,
                    present: true,
                    zero: false,
                    data: true,
                    compressed: false,
                    host: Some(offset),
                }];
                self.done.push_back(Reply {
                    token,
                    result: error.map_or(Ok(()), Err),
                    memory: None,
                    extents,
                });
                return Ok(());
            }
        };
        if let Some(error) = error {
            drop(kind);
            self.done.push_back(Reply {
                token,
                result: Err(error),
                memory,
                extents: vec![],
            });
            return Ok(());
        }
        let slot = self.flights.insert(Flight {
            token,
            memory,
            extents: vec![],
        });
        self.storage
            .submit(Op { file: IMAGE, kind }, slot)
            .ok()
            .expect("room");
        Ok(())
    }
    pub fn kick(&mut self) {
        self.storage.kick()
    }
    pub fn complete(&mut self) -> Option<Reply<S::Memory>> {
        if let Some(c) = self.storage.complete() {
            let f = self.flights.remove(c.slot);
            let result = c.result.map(drop).map_err(|e| Error::Io {
                operation: "op",
                file: "image".into(),
                offset: 0,
                bytes: 0,
                errno: e.raw_os_error().unwrap_or(5),
            });
            return Some(Reply {
                token: f.token,
                result,
                memory: f.memory,
                extents: f.extents,
            });
        }
        self.done.pop_front()
    }
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if self.done.is_empty() {
            self.storage.wait(timeout)
        }
    }
    pub fn in_flight(&self) -> usize {
        self.flights.len() + self.done.len()
    }
    pub fn with_storage<R>(&mut self, f: impl FnOnce(&mut S) -> R) -> R {
        f(&mut self.storage)
    }
}
impl<S: Storage> Drop for Queue<S> {
    fn drop(&mut self) {
        self.storage.kick();
        while self.in_flight() > 0 {
            if self.complete().is_none() {
                self.wait(None);
            }
        }
    }
}

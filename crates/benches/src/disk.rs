//! A device in memory: its maintenance and one queue, on the calling thread.

use std::rc::Rc;

use urus_engine::request::{Extent, Request, RequestKind};
use urus_engine::storage::FileId;
use urus_engine::sync::Arc;
use urus_engine::{Control, LayerFormat, LayerSpec, Maintenance, Options, Queue, Shared};
use urus_format::Header;
use urus_format::create::{CreateOptions, layout};

use crate::memory::{Bytes, File, MemoryStorage};

/// Requests in flight.
pub const DEPTH: usize = 32;
/// Bytes of a cluster.
pub const CLUSTER_BYTES: u64 = 64 << 10;

/// The image file of a new, empty disk.
#[must_use]
pub fn new_file(size: u64) -> Rc<File> {
    let image = layout(&CreateOptions::new(size)).expect("options that go together");
    let file = File::default();
    for (offset, bytes) in &image.writes {
        file.write(*offset, bytes);
    }
    file.reach(image.file_bytes);
    Rc::new(file)
}

/// An open device.
pub struct Disk {
    maintenance: Maintenance<MemoryStorage>,
    queue: Queue<MemoryStorage>,
}

impl Disk {
    /// Opens the chain of these qcow2 files, the image first.
    #[must_use]
    pub fn open(files: &[Rc<File>], options: Options) -> Self {
        let layers = files
            .iter()
            .zip(0..)
            .map(|(file, number)| {
                let mut start = vec![0; usize::try_from(CLUSTER_BYTES).expect("64 KiB")];
                file.read(0, &mut start);
                let header = Header::parse(&start, file.len()).expect("an image");
                LayerSpec {
                    file: FileId(number),
                    name: format!("layer {number}"),
                    format: LayerFormat::Qcow2(Box::new(header)),
                }
            })
            .collect();
        let storage = MemoryStorage::new(files);
        let maintenance = Maintenance::open(storage, layers, options).expect("an image in order");
        let queue = Queue::new(maintenance.shared(), MemoryStorage::new(files), DEPTH);
        Self { maintenance, queue }
    }

    /// What threads share.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        self.maintenance.shared()
    }

    /// The executor of what all queues share.
    pub fn maintenance(&mut self) -> &mut Maintenance<MemoryStorage> {
        &mut self.maintenance
    }

    /// Requests that need nobody but the queue: so many at once, until all are answered.
    ///
    /// # Panics
    /// Where one of them fails or is not answered.
    pub fn hits(&mut self, depth: usize, requests: impl Iterator<Item = RequestKind<Bytes>>) {
        let mut requests = requests.zip(0..).peekable();
        while requests.peek().is_some() {
            for (kind, token) in requests.by_ref().take(depth) {
                let taken = self.queue.submit(Request { token, kind });
                assert!(taken.is_ok(), "the queue has room");
            }
            self.queue.kick();
            while let Some(reply) = self.queue.complete() {
                assert!(reply.result.is_ok(), "{:?}", reply.result);
            }
            assert_eq!(self.queue.in_flight(), 0, "hits wait for nothing");
        }
    }

    /// Any requests, one batch after the other, until all are answered.
    ///
    /// # Panics
    /// Where one of them fails.
    pub fn run(&mut self, requests: impl Iterator<Item = RequestKind<Bytes>>) {
        let mut requests = requests.zip(0..).peekable();
        while requests.peek().is_some() {
            for (kind, token) in requests.by_ref().take(DEPTH) {
                let taken = self.queue.submit(Request { token, kind });
                assert!(taken.is_ok(), "the queue has room");
            }
            while self.queue.in_flight() > 0 {
                while let Some(reply) = self.queue.complete() {
                    assert!(reply.result.is_ok(), "{:?}", reply.result);
                }
                self.maintenance.poll();
            }
        }
    }

    /// How a place is stored.
    ///
    /// # Panics
    /// Where that cannot be told.
    pub fn extent(&mut self, offset: u64) -> Extent {
        let kind = RequestKind::BlockStatus { offset, len: 512 };
        let taken = self.queue.submit(Request { token: 0, kind });
        assert!(taken.is_ok(), "the queue has room");
        loop {
            if let Some(reply) = self.queue.complete() {
                return reply.extents[0];
            }
            self.maintenance.poll();
        }
    }

    /// Makes everything durable, and ends it.
    ///
    /// # Panics
    /// Where that fails.
    pub fn close(mut self) {
        drop(self.queue);
        let shared = self.maintenance.shared();
        shared.control(Control::Close(Box::new(|result| {
            result.expect("nothing stands against it");
        })));
        self.maintenance.run();
    }
}

/// A read.
#[must_use]
pub fn read(offset: u64, len: usize) -> RequestKind<Bytes> {
    RequestKind::Read {
        offset,
        memory: Bytes::Guest(len),
    }
}

/// A write.
#[must_use]
pub fn write(offset: u64, len: usize) -> RequestKind<Bytes> {
    RequestKind::Write {
        offset,
        memory: Bytes::Guest(len),
        fua: false,
    }
}

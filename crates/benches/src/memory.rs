//! Files in memory, and a storage that completes everything when it is submitted.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use urus_engine::storage::{
    Completion, FileId, FileProperties, Memory, Notify, Op, OpKind, Slot, Storage,
};
use urus_engine::sync::Arc;

/// Bytes kept together.
const PAGE_BYTES: u64 = 4096;

/// A file. Keeps what the engine writes of its own, and of the guest's data only how far it reaches.
#[derive(Debug, Default)]
pub struct File {
    pages: RefCell<BTreeMap<u64, Vec<u8>>>,
    bytes: Cell<u64>,
}

impl File {
    /// Writes.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.for_each_page(offset, bytes.len(), |page, within, range| {
            let mut pages = self.pages.borrow_mut();
            let page = pages
                .entry(page)
                .or_insert_with(|| vec![0; index(PAGE_BYTES)]);
            page[within..within + range.len()].copy_from_slice(&bytes[range]);
        });
        self.reach(offset + bytes.len() as u64);
    }

    /// Reads; what was never written is zero.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.for_each_page(offset, bytes.len(), |page, within, range| {
            let part = &mut bytes[range];
            match self.pages.borrow().get(&page) {
                Some(page) => part.copy_from_slice(&page[within..within + part.len()]),
                None => part.fill(0),
            }
        });
    }

    /// Its length.
    pub fn len(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Is at least as long as this afterwards.
    pub fn reach(&self, bytes: u64) {
        self.bytes.set(self.bytes.get().max(bytes));
    }

    /// Calls `f` with each page of a range, where the part begins in it, and which part of the range that is.
    fn for_each_page(
        &self,
        offset: u64,
        len: usize,
        mut f: impl FnMut(u64, usize, std::ops::Range<usize>),
    ) {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = index(at % PAGE_BYTES);
            let step = (index(PAGE_BYTES) - within).min(len - done);
            f(at / PAGE_BYTES, within, done..done + step);
            done += step;
        }
    }
}

/// Memory of requests.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// The guest's: a length without bytes, because copying them is not the engine's work.
    Guest(usize),
    /// The engine's own: metadata has to be what it is.
    Own {
        /// Shared by all parts.
        block: Rc<RefCell<Vec<u8>>>,
        /// Where this part begins.
        start: usize,
        /// Its bytes.
        len: usize,
    },
}

impl Memory for Bytes {
    fn len(&self) -> usize {
        match self {
            Self::Guest(len) | Self::Own { len, .. } => *len,
        }
    }

    fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= Memory::len(self), "a part of the memory");
        match self {
            Self::Guest(_) => Self::Guest(len),
            Self::Own {
                block, start: own, ..
            } => Self::Own {
                block: Rc::clone(block),
                start: own + start,
                len,
            },
        }
    }

    fn read(&self, start: usize, dst: &mut [u8]) {
        if let Self::Own {
            block, start: own, ..
        } = self
        {
            dst.copy_from_slice(&block.borrow()[own + start..own + start + dst.len()]);
        }
    }

    fn write(&self, start: usize, src: &[u8]) {
        if let Self::Own {
            block, start: own, ..
        } = self
        {
            block.borrow_mut()[own + start..own + start + src.len()].copy_from_slice(src);
        }
    }

    fn zero(&self, start: usize, len: usize) {
        if let Self::Own {
            block, start: own, ..
        } = self
        {
            block.borrow_mut()[own + start..own + start + len].fill(0);
        }
    }

    fn is_zero(&self) -> bool {
        match self {
            Self::Guest(len) => *len == 0,
            Self::Own { block, start, len } => block.borrow()[*start..start + len]
                .iter()
                .all(|byte| *byte == 0),
        }
    }

    fn is_aligned(&self, _align: usize) -> bool {
        true
    }

    /// What is gathered is data: a length is enough.
    fn chain(parts: Vec<Self>) -> Self {
        Self::Guest(parts.iter().map(Memory::len).sum())
    }
}

/// Nobody sleeps here.
struct Silent;

impl Notify for Silent {
    fn notify(&self) {}
}

/// A storage over such files.
pub struct MemoryStorage {
    files: Vec<Rc<File>>,
    done: VecDeque<Completion>,
}

impl MemoryStorage {
    /// Over these files, by number.
    #[must_use]
    pub fn new(files: &[Rc<File>]) -> Self {
        Self {
            files: files.to_vec(),
            done: VecDeque::new(),
        }
    }

    fn file(&self, file: FileId) -> &File {
        &self.files[usize::from(file.0)]
    }

    fn apply(&self, op: Op<Bytes>) -> usize {
        let file = self.file(op.file);
        match op.kind {
            OpKind::Read { offset, memory } => {
                let rest = file.len().saturating_sub(offset);
                let len = Memory::len(&memory).min(usize::try_from(rest).unwrap_or(usize::MAX));
                if let Bytes::Own { block, start, .. } = &memory {
                    file.read(offset, &mut block.borrow_mut()[*start..start + len]);
                }
                len
            }
            OpKind::Write { offset, memory, .. } => {
                let len = Memory::len(&memory);
                match &memory {
                    Bytes::Guest(_) => file.reach(offset + len as u64),
                    Bytes::Own { block, start, .. } => {
                        file.write(offset, &block.borrow()[*start..start + len]);
                    }
                }
                len
            }
            OpKind::ZeroRange { offset, len } | OpKind::Allocate { offset, len } => {
                file.reach(offset + len);
                0
            }
            OpKind::SetLen { len } => {
                file.bytes.set(len);
                0
            }
            OpKind::Job(job) => {
                job();
                0
            }
            OpKind::Punch { .. } | OpKind::SyncData => 0,
        }
    }
}

impl Storage for MemoryStorage {
    type Memory = Bytes;

    fn allocate(&self, bytes: usize) -> Option<Bytes> {
        Some(Bytes::Own {
            block: Rc::new(RefCell::new(vec![0; bytes])),
            start: 0,
            len: bytes,
        })
    }

    fn submit(&mut self, op: Op<Bytes>, slot: Slot) -> Result<(), Op<Bytes>> {
        let result = Ok(self.apply(op));
        self.done.push_back(Completion { slot, result });
        Ok(())
    }

    fn read_now(&mut self, file: FileId, offset: u64, memory: &Bytes) -> bool {
        // The guest's has no bytes to fill.
        let is_whole = offset + Memory::len(memory) as u64 <= self.file(file).len();
        is_whole && matches!(memory, Bytes::Guest(_))
    }

    fn kick(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn wait(&mut self, _timeout: Option<Duration>) {}

    fn notifier(&self) -> Arc<dyn Notify> {
        Arc::new(Silent)
    }

    fn properties(&self, _file: FileId) -> FileProperties {
        FileProperties {
            alignment: 1,
            memory_alignment: 1,
            regular: true,
            can_punch: true,
            can_zero_range: true,
        }
    }

    fn file_len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.file(file).len())
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("a 64-bit machine")
}

//! Files in memory that several threads work on, and what a power cut would leave of them.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shuttle::rand::{Rng as _, thread_rng};
use shuttle::sync::atomic::AtomicUsize;
use shuttle::sync::{Condvar, Mutex};
use urus_engine::storage::{
    Completion, FileId, FileProperties, Memory, Notify, Op, OpKind, Slot, Storage,
};
use urus_sim::memory::SimMemory;
use urus_sim::world::IMAGE;

/// What wakes a thread out of its sleep.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Notify for Bell {
    fn notify(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }
}

/// A change that no sync has covered yet.
enum Change {
    Write(usize, Vec<u8>),
    Zero {
        start: usize,
        end: usize,
        extends: bool,
    },
    Allocate(usize),
    Length(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let mut reach = |end: usize| {
            let len = bytes.len().max(end);
            bytes.resize(len, 0);
        };
        match self {
            Self::Write(offset, data) => {
                reach(offset + data.len());
                bytes[*offset..offset + data.len()].copy_from_slice(data);
            }
            Self::Zero {
                start,
                end,
                extends,
            } => {
                if *extends {
                    reach(*end);
                }
                let end = (*end).min(bytes.len());
                bytes[(*start).min(end)..end].fill(0);
            }
            Self::Allocate(end) => reach(*end),
            Self::Length(len) => bytes.resize(*len, 0),
        }
    }
}

struct File {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// From the durable bytes to those of now, in order.
    pending: Vec<Change>,
    properties: FileProperties,
}

impl File {
    fn sync(&mut self) {
        self.durable.clone_from(&self.now);
        self.pending.clear();
    }
}

struct Files {
    /// Never locked across a switch of threads.
    files: std::sync::Mutex<Vec<File>>,
    /// Where shuttle may switch threads, before each operation.
    point: AtomicUsize,
}

/// Files in memory.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Files>);

/// Said of a device: it is paused, and has nothing to do with its files.
pub(crate) type Paused = Arc<AtomicBool>;

/// One thread's way to the disk. Operations that a `kick` has started happen later, in any order: what else goes on meanwhile finds them in
/// flight.
pub(crate) struct Handle {
    disk: Disk,
    paused: Paused,
    bell: Arc<Bell>,
    submitted: Vec<(Op<SimMemory>, Slot)>,
    started: Vec<(Op<SimMemory>, Slot)>,
    done: VecDeque<Completion>,
}

impl Disk {
    pub(crate) fn new(files: impl Iterator<Item = (Vec<u8>, FileProperties)>) -> Self {
        let file = |(bytes, properties): (Vec<u8>, _)| File {
            now: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
            properties,
        };
        Self(Arc::new(Files {
            files: std::sync::Mutex::new(files.map(file).collect()),
            point: AtomicUsize::new(0),
        }))
    }

    pub(crate) fn handle(&self, paused: &Paused) -> Handle {
        Handle {
            disk: self.clone(),
            paused: Arc::clone(paused),
            bell: Arc::default(),
            submitted: Vec::new(),
            started: Vec::new(),
            done: VecDeque::new(),
        }
    }

    /// Every file as reads see it.
    pub(crate) fn now(&self) -> Vec<Vec<u8>> {
        let files = self.0.files.lock().unwrap();
        files.iter().map(|file| file.now.clone()).collect()
    }

    /// All of it becomes durable.
    pub(crate) fn sync(&self) {
        let mut files = self.0.files.lock().unwrap();
        files.iter_mut().for_each(File::sync);
    }

    /// Every file as a power cut leaves it, drawn by lot.
    pub(crate) fn after_power_cut(&self) -> Vec<Vec<u8>> {
        // Drawn before the lock: a draw may be a switch of threads.
        let (all, lot) = (thread_rng().gen_range(0..4), thread_rng().r#gen::<u64>());
        let mut lot = urus_sim::rng::Rng::new(lot);
        let files = self.0.files.lock().unwrap();
        let cut = |file: &File| {
            let mut bytes = file.durable.clone();
            let kept = |lot: &mut urus_sim::rng::Rng| all == 0 || lot.chance(128);
            for change in &file.pending {
                if kept(&mut lot) {
                    change.apply(&mut bytes);
                }
            }
            bytes
        };
        files.iter().map(cut).collect()
    }

    fn perform(&self, Op { file, kind }: Op<SimMemory>, paused: &Paused) -> usize {
        self.0.point.fetch_add(1, Ordering::SeqCst);
        let still = paused.load(Ordering::SeqCst);
        let change = match kind {
            OpKind::SyncData => {
                self.0.files.lock().unwrap()[usize::from(file.0)].sync();
                return 0;
            }
            _ if still => panic!("an operation on {file:?} during a pause"),
            OpKind::Job(job) => {
                job();
                return 0;
            }
            OpKind::Read { offset, memory } => {
                let files = self.0.files.lock().unwrap();
                let File {
                    now, properties, ..
                } = &files[usize::from(file.0)];
                aligned(properties, offset, &memory);
                let start = at(offset).min(now.len());
                let end = (start + memory.len()).min(now.len());
                memory.write(0, &now[start..end]);
                return end - start;
            }
            OpKind::Write { offset, memory, .. } => {
                let files = self.0.files.lock().unwrap();
                aligned(&files[usize::from(file.0)].properties, offset, &memory);
                Change::Write(at(offset), memory.to_vec())
            }
            OpKind::Punch { offset, len } => Change::Zero {
                start: at(offset),
                end: at(offset + len),
                extends: false,
            },
            OpKind::ZeroRange { offset, len } => Change::Zero {
                start: at(offset),
                end: at(offset + len),
                extends: true,
            },
            OpKind::Allocate { offset, len } => Change::Allocate(at(offset + len)),
            OpKind::SetLen { len } => Change::Length(at(len)),
        };
        assert_eq!(file, IMAGE, "a backing file is never changed");
        let done = match &change {
            Change::Write(_, data) => data.len(),
            _ => 0,
        };
        let files = &mut *self.0.files.lock().unwrap();
        let file = &mut files[usize::from(file.0)];
        change.apply(&mut file.now);
        file.pending.push(change);
        done
    }
}

impl Handle {
    /// One of the operations that were started happens.
    fn happen(&mut self) {
        let next = thread_rng().gen_range(0..self.started.len());
        let (op, slot) = self.started.swap_remove(next);
        let result = Ok(self.disk.perform(op, &self.paused));
        self.done.push_back(Completion { slot, result });
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn aligned(properties: &FileProperties, offset: u64, memory: &SimMemory) {
    let unit = u64::from(properties.alignment);
    let fits = offset.is_multiple_of(unit) && (memory.len() as u64).is_multiple_of(unit);
    let memory_unit = usize::try_from(properties.memory_alignment).unwrap();
    assert!(
        fits && memory.is_aligned(memory_unit),
        "{} bytes at {offset} are not aligned to {unit}",
        memory.len()
    );
}

impl Storage for Handle {
    type Memory = SimMemory;

    fn allocate(&self, bytes: usize) -> Option<SimMemory> {
        Some(SimMemory::zeroed(bytes))
    }

    fn submit(&mut self, op: Op<SimMemory>, slot: Slot) -> Result<(), Op<SimMemory>> {
        self.submitted.push((op, slot));
        Ok(())
    }

    fn read_now(&mut self, file: FileId, offset: u64, memory: &SimMemory) -> bool {
        if thread_rng().gen_range(0..2) == 0 {
            return false;
        }
        assert!(
            !self.paused.load(Ordering::SeqCst),
            "a read of {file:?} during a pause"
        );
        let files = self.disk.0.files.lock().unwrap();
        let start = at(offset);
        match files[usize::from(file.0)]
            .now
            .get(start..start + memory.len())
        {
            Some(found) => {
                memory.write(0, found);
                true
            }
            None => false,
        }
    }

    fn kick(&mut self) {
        self.started.append(&mut self.submitted);
    }

    fn complete(&mut self) -> Option<Completion> {
        if self.done.is_empty() && !self.started.is_empty() && thread_rng().gen_range(0..2) == 0 {
            self.happen();
        }
        self.done.pop_front()
    }

    fn wait(&mut self, _timeout: Option<Duration>) {
        if self.done.is_empty() && !self.started.is_empty() {
            self.happen();
        }
        if !self.done.is_empty() {
            return;
        }
        let mut rung = self.bell.rung.lock().unwrap();
        while !*rung {
            rung = self.bell.changed.wait(rung).unwrap();
        }
        *rung = false;
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        Arc::clone(&self.bell) as Arc<dyn Notify>
    }

    fn properties(&self, file: FileId) -> FileProperties {
        self.disk.0.files.lock().unwrap()[usize::from(file.0)].properties
    }

    fn file_len(&self, file: FileId) -> io::Result<u64> {
        let files = self.disk.0.files.lock().unwrap();
        Ok(files[usize::from(file.0)].now.len() as u64)
    }
}

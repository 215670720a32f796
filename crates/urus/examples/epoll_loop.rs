//! How a virtual machine monitor serves a disk: two queues on two threads, each in an epoll loop of its own,
//! transferring straight from and to the guest's memory.
//!
//! The guest is played by the main thread: it puts requests into a "virtqueue" and rings a doorbell (an
//! ioeventfd); the loop submits all that it finds as one batch, and tells the guest what has ended.
//!
//! `cargo run --release --example epoll_loop -- disk.qcow2` (overwrites the first 8 MiB of the disk)

use std::cell::UnsafeCell;
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use urus::{Buffer, OpenOptions, QueueSeat, Request};

type Failure = Box<dyn Error + Send + Sync>;

/// The guest's memory: shared with a guest that may change it at any time, so nobody here ever borrows its
/// bytes. A real one is a mapped memfd.
struct GuestMemory(Box<[UnsafeCell<u8>]>);

// SAFETY: the bytes are only reached through raw pointers, by copies and by the kernel; a race between those
// and the guest can give the guest mixed bytes, and nothing else.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self((0..bytes).map(|_| UnsafeCell::new(0)).collect()))
    }

    /// A buffer over pieces of this memory (offset, length). It keeps the memory alive, so the machine can go
    /// away at any time.
    fn buffer(self: &Arc<Self>, pieces: &[(usize, usize)]) -> Buffer {
        let segments: Vec<_> = pieces
            .iter()
            .map(|&(offset, len)| {
                let piece = &self.0[offset..offset + len];
                (NonNull::from(piece).cast::<u8>(), len)
            })
            .collect();
        // SAFETY: the segments are parts of this memory (indexed above), which lives as long as the `Arc` given
        // along.
        unsafe { Buffer::from_segments(Arc::clone(self) as Arc<_>, &segments) }
    }

    fn fill(self: &Arc<Self>, offset: usize, bytes: &[u8]) {
        self.buffer(&[(offset, bytes.len())]).copy_from(0, bytes);
    }

    fn bytes(self: &Arc<Self>, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.buffer(&[(offset, len)]).copy_to(0, &mut bytes);
        bytes
    }
}

/// What the guest asks for; the pieces lie in its memory.
enum GuestRequest {
    Write {
        sector: u64,
        pieces: [(usize, usize); 2],
    },
    Read {
        sector: u64,
        pieces: [(usize, usize); 2],
    },
    Flush,
}

/// One virtqueue: requests one way, the tokens of what has ended the other way.
struct VirtQueue {
    available: Mutex<Vec<(u64, GuestRequest)>>,
    doorbell: OwnedFd,
    used: mpsc::Sender<(u64, bool)>,
    stop: AtomicBool,
}

impl VirtQueue {
    fn ring(&self) -> rustix::io::Result<usize> {
        rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes())
    }
}

/// The loop of one queue, on its own thread.
fn serve(seat: QueueSeat, memory: &Arc<GuestMemory>, virtqueue: &VirtQueue) -> Result<(), Failure> {
    const DOORBELL: u64 = 0;
    const COMPLETIONS: u64 = 1;
    // The ring belongs to the thread that activates the seat.
    let mut queue = seat.activate()?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |fd, data| {
        epoll::add(
            &epoll,
            fd,
            epoll::EventData::new_u64(data),
            epoll::EventFlags::IN,
        )
    };
    watch(virtqueue.doorbell.as_fd(), DOORBELL)?;
    watch(queue.event_fd()?, COMPLETIONS)?;
    let mut events = Vec::with_capacity(2);
    loop {
        events.clear();
        epoll::wait(&epoll, spare_capacity(&mut events), None)?;
        for event in &events {
            if event.data.u64() == COMPLETIONS {
                queue.consume_event();
            } else {
                rustix::io::read(&virtqueue.doorbell, &mut [0; 8])?;
            }
        }
        // A full queue leaves the rest in the virtqueue until something has ended.
        let mut available = virtqueue
            .available
            .lock()
            .expect("no thread panics with it");
        let room = queue.depth() - queue.in_flight();
        let count = room.min(available.len());
        for (token, request) in available.drain(..count) {
            let request = match request {
                GuestRequest::Write { sector, pieces } => {
                    Request::write(token, sector * 512, memory.buffer(&pieces))
                }
                GuestRequest::Read { sector, pieces } => {
                    Request::read(token, sector * 512, memory.buffer(&pieces))
                }
                GuestRequest::Flush => Request::flush(token),
            };
            queue
                .submit(request)
                .map_err(|rejected| rejected.to_string())?;
        }
        drop(available);
        // One system call for the whole batch.
        queue.kick();
        let mut ended = false;
        while let Some(completion) = queue.completion() {
            ended = true;
            if let Err(error) = &completion.result {
                eprintln!("request {}: {error}", completion.token);
            }
            virtqueue
                .used
                .send((completion.token, completion.result.is_ok()))?;
        }
        if ended
            && !virtqueue
                .available
                .lock()
                .expect("no thread panics with it")
                .is_empty()
        {
            virtqueue.ring()?;
        }
        if virtqueue.stop.load(Ordering::Acquire) && queue.in_flight() == 0 {
            return Ok(());
        }
    }
}

/// The guest's side of one queue: writes, flushes and reads 4 MiB of the disk, in one batch each.
fn drive(
    number: u64,
    memory: &Arc<GuestMemory>,
    virtqueue: &VirtQueue,
    used: &mpsc::Receiver<(u64, bool)>,
) -> Result<(), Failure> {
    const REQUESTS: usize = 64;
    const BYTES: usize = 64 << 10;
    let base = usize::try_from(number)? * 2 * REQUESTS * BYTES;
    let sector = |index: usize| (number << 13) + index as u64 * 128;
    let run = |requests: Vec<GuestRequest>| -> Result<(), Failure> {
        let count = requests.len();
        virtqueue
            .available
            .lock()
            .expect("no thread panics with it")
            .extend((0..).zip(requests));
        virtqueue.ring()?;
        for _ in 0..count {
            let (token, good) = used.recv()?;
            if !good {
                return Err(format!("request {token} of queue {number} has failed").into());
            }
        }
        Ok(())
    };
    // Each request in two pieces, as a guest's pages lie.
    let pieces = |start: usize| [(start, 4096), (start + 4096, BYTES - 4096)];
    let pattern = |index: usize| [index.to_le_bytes()[0] ^ number.to_le_bytes()[0] ^ 0x5a; BYTES];
    let written = |index: usize| base + index * BYTES;
    let read = |index: usize| base + (REQUESTS + index) * BYTES;

    (0..REQUESTS).for_each(|index| memory.fill(written(index), &pattern(index)));
    let write = |index| GuestRequest::Write {
        sector: sector(index),
        pieces: pieces(written(index)),
    };
    run((0..REQUESTS).map(write).collect())?;
    run(vec![GuestRequest::Flush])?;
    run((0..REQUESTS)
        .map(|index| GuestRequest::Read {
            sector: sector(index),
            pieces: pieces(read(index)),
        })
        .collect())?;
    for index in 0..REQUESTS {
        if memory.bytes(read(index), BYTES) != pattern(index) {
            return Err(format!(
                "request {index} of queue {number} has read something else than was written"
            )
            .into());
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let image = std::env::args_os()
        .nth(1)
        .ok_or("usage: epoll_loop IMAGE")?;
    let device = OpenOptions::new().open(image)?;
    if device.size() < 8 << 20 {
        return Err("the disk is smaller than 8 MiB".into());
    }
    println!(
        "{}: {} bytes, {}",
        device.name(),
        device.size(),
        device.driver()
    );
    let memory = GuestMemory::new(16 << 20);
    thread::scope(|scope| {
        let mut loops = Vec::new();
        let mut guests = Vec::new();
        for number in 0..2 {
            let (sender, used) = mpsc::channel();
            let virtqueue = Arc::new(VirtQueue {
                available: Mutex::default(),
                doorbell: eventfd(0, EventfdFlags::CLOEXEC)?,
                used: sender,
                stop: AtomicBool::new(false),
            });
            let seat = device.queue()?;
            let (memory, there) = (&memory, Arc::clone(&virtqueue));
            loops.push(scope.spawn(move || serve(seat, memory, &there)));
            guests.push((number, virtqueue, used));
        }
        for (number, virtqueue, used) in guests {
            let result = drive(number, &memory, &virtqueue, &used);
            virtqueue.stop.store(true, Ordering::Release);
            virtqueue.ring()?;
            result?;
            println!("queue {number}: 4 MiB written, flushed, and read back");
        }
        for queue_loop in loops {
            queue_loop
                .join()
                .map_err(|_| "a queue's thread has panicked")??;
        }
        Ok::<_, Failure>(())
    })?;
    device.close()?;
    Ok(())
}

//! A virtqueue of a hostile driver: descriptor chains, rings and requests that make no sense, over a guest's memory of which every byte is
//! looked at afterwards.
//!
//! The driver is virtio-queue's mock. What it offers is walked here anew, and with less care than by the server: a chain may be refused, but
//! what is written must lie in what one of the chains offered as writable, or in the used ring; and each head is answered as often
//! as it was offered, or not at all once the queue is broken.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use urus::{CreateOptions, Device, Format, IoDriver, OpenOptions, Queue};
use urus_vhost_user::fuzzing::{Memory, Setup, Virtqueue};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Verdict;
use crate::input::Input;
use crate::require;

/// Start and bytes of the memory's regions: one with the rings, a hole, and two that touch.
const REGIONS: [(u64, usize); 3] = [(0, 0x4_0000), (0x10_0000, 0x1_0000), (0x11_0000, 0x1_0000)];
/// Where indirect tables are put.
const TABLES: u64 = 0x1_0000;
/// Where requests are put.
const REQUESTS: u64 = 0x1_8000;
const DESCRIPTOR_BYTES: u64 = 16;
/// What the memory is full of.
const CANARY: u8 = 0xc5;

const DISK_BYTES: u64 = 8 << 20;
const QUEUE_DEPTH: u32 = 16;
/// Between two looks of the device at the rings.
const MOST_ROUNDS: usize = 6;
const MOST_CHANGES: u8 = 40;
/// Descriptors that the server takes in one chain.
const MOST: u64 = 1024;
/// A request that is not answered for so long never is.
const PATIENCE: Duration = Duration::from_secs(20);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What all inputs share. Fields drop in this order: the queue on its device, in its directory.
struct Bench {
    queue: Queue,
    device: Device,
    memory: Memory,
    _dir: TempDir,
}

impl Bench {
    fn new() -> Result<Self, String> {
        fn text(error: impl std::fmt::Display) -> String {
            error.to_string()
        }
        // Flushes are not what is judged here.
        let fast = Path::new("/dev/shm");
        let dir = if fast.is_dir() {
            tempfile::tempdir_in(fast)
        } else {
            tempfile::tempdir()
        }
        .map_err(text)?;
        let path = dir.path().join("disk");
        let mut create = CreateOptions::new();
        create.format(Format::Qcow2).size(DISK_BYTES);
        urus::create(&path, &create).map_err(text)?;
        let device = OpenOptions::new()
            .io(IoDriver::Blocking)
            .queue_depth(QUEUE_DEPTH)
            .open(&path)
            .map_err(text)?;
        let queue = device
            .queue()
            .and_then(urus::QueueSeat::activate)
            .map_err(text)?;
        let region = |(start, bytes): (u64, usize)| {
            let file = tempfile::tempfile_in(dir.path()).map_err(text)?;
            file.set_len(bytes as u64).map_err(text)?;
            Ok((start, bytes as u64, file))
        };
        let regions: Result<Vec<_>, String> = REGIONS.into_iter().map(region).collect();
        let memory = Memory::new(regions?)?;
        Ok(Self {
            queue,
            device,
            memory,
            _dir: dir,
        })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.device.close();
    }
}

thread_local! {
    static BENCH: RefCell<Result<Bench, String>> = RefCell::new(Bench::new());
}

/// Opens the disk, so that no input pays for it.
///
/// # Errors
/// Why it cannot.
pub fn prepare() -> Verdict {
    BENCH.with_borrow(|bench| bench.as_ref().map(|_| ()).map_err(Clone::clone))
}

/// Sets a virtqueue up and lets a driver do what the bytes say.
///
/// # Errors
/// What is wrong.
pub fn virtqueue(data: &[u8]) -> Verdict {
    BENCH.with_borrow_mut(|bench| {
        let bench = bench.as_mut().map_err(|error| error.clone())?;
        play(bench, &mut Input::new(data))
    })
}

fn play(bench: &mut Bench, input: &mut Input<'_>) -> Verdict {
    let memory = bench.memory.guest();
    for (start, bytes) in REGIONS {
        let filled = memory.write_slice(&vec![CANARY; bytes], GuestAddress(start));
        filled.map_err(|error| error.to_string())?;
    }
    let shape = input.u8();
    let size = 1 << (shape & 7).min(6);
    let driver = MockSplitQueue::create(memory, GuestAddress(0), size);
    let mut setup = Setup {
        size,
        descriptors: driver.desc_table_addr().0,
        avail: driver.avail_addr().0,
        used: driver.used_addr().0,
        next_avail: 0,
        next_used: 0,
        event_idx: shape & 0x08 != 0,
        read_only: shape & 0x10 != 0,
        write_through: shape & 0x20 != 0,
    };
    if shape & 0x40 != 0 {
        (setup.next_avail, setup.next_used) = (input.u16(), input.u16());
    }
    if shape & 0x80 != 0 {
        // Nothing keeps a front end from such places.
        let which = input.u8();
        for (bit, place) in [&mut setup.descriptors, &mut setup.avail, &mut setup.used]
            .into_iter()
            .enumerate()
        {
            if which & 1 << bit != 0 {
                *place = address(input);
            }
        }
    }
    driver.avail().idx().store(setup.next_avail.to_le());
    driver.used().idx().store(setup.next_used.to_le());
    let kick = File::open("/dev/null").map_err(|error| error.to_string())?;
    let mut game = Game {
        memory,
        driver,
        device: Virtqueue::new(&bench.memory, &setup, kick),
        setup,
        avail_index: setup.next_avail,
        used_index: setup.next_used,
        tainted: false,
    };
    for _ in 0..MOST_ROUNDS {
        game.drive(input);
        game.look(&mut bench.queue)?;
        if input.is_empty() {
            break;
        }
    }
    Ok(())
}

/// A driver and its device.
struct Game<'a> {
    memory: &'a GuestMemoryMmap,
    driver: MockSplitQueue<'a, GuestMemoryMmap>,
    device: Virtqueue,
    setup: Setup,
    avail_index: u16,
    /// Where the device is in the used ring.
    used_index: u16,
    /// The rings or tables themselves were offered to be written to, or overlap: what they say afterwards proves nothing.
    tainted: bool,
}

impl Game<'_> {
    /// What the driver does before the device looks.
    fn drive(&mut self, input: &mut Input<'_>) {
        for _ in 0..input.u8() % MOST_CHANGES {
            self.change(input);
        }
        let offered = input.u8();
        for _ in 0..offered & 0x1f {
            let head = self.index(input);
            self.offer(head);
        }
        // A lie of how many there are.
        if offered & 0xc0 == 0xc0 {
            self.avail_index = self.avail_index.wrapping_add(input.u16());
        }
        self.driver.avail().idx().store(self.avail_index.to_le());
    }

    /// Of a descriptor; rarely beyond the end of the table.
    fn index(&self, input: &mut Input<'_>) -> u16 {
        match u16::from(input.u8()) {
            beyond @ 0xf8.. => beyond,
            index => index & (self.setup.size - 1),
        }
    }

    fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail_index & (self.setup.size - 1));
        if let Ok(entry) = self.driver.avail().ring().ref_at(slot) {
            entry.store(head.to_le());
            self.avail_index = self.avail_index.wrapping_add(1);
        }
    }

    fn change(&mut self, input: &mut Input<'_>) {
        match input.u8() % 10 {
            0..=2 => {
                let index = u16::from(input.u8()) & (self.setup.size - 1);
                let descriptor = descriptor(input);
                let _ = self.driver.desc_table().store(index, descriptor);
            }
            3 | 4 => {
                let at = TABLES + u64::from(input.u8()) * DESCRIPTOR_BYTES;
                let _ = self.memory.write_obj(descriptor(input), GuestAddress(at));
            }
            5..=7 => self.request(input),
            8 => {
                // Event indices, flags, the entries beyond the end.
                let at = input.u16() & 0x0fff;
                let few = usize::from(input.u8() & 7);
                let _ = self
                    .memory
                    .write_slice(input.take(few), GuestAddress(at.into()));
            }
            _ => {
                let at = address(input);
                let few = usize::from(input.u8() & 31);
                let _ = self.memory.write_slice(input.take(few), GuestAddress(at));
            }
        }
    }

    /// A request as a driver would make it, of three descriptors in a row, direct or not; and offers it.
    fn request(&mut self, input: &mut Input<'_>) {
        let (kind, sector, segments) = (input.u8(), input.u16(), input.u8());
        let number = u64::from(input.u8());
        let at = REQUESTS + (number & 0x3f) * 0x400;
        let code = [0_u32, 1, 4, 8, 11, 13, 2, 0xffff][usize::from(kind & 7)];
        let mut header = [0; 16];
        header[..4].copy_from_slice(&code.to_le_bytes());
        header[8..10].copy_from_slice(&sector.to_le_bytes());
        let _ = self.memory.write_slice(&header, GuestAddress(at));
        let data_len = match code {
            0 | 1 => u32::from(segments) * 512,
            8 => 20,
            11 | 13 => u32::from(segments & 3) * 16,
            _ => 0,
        };
        if matches!(code, 11 | 13) {
            for segment in 0..u64::from(segments & 3) {
                let mut bytes = [0; 16];
                bytes[..2].copy_from_slice(&input.u16().to_le_bytes());
                bytes[8..10].copy_from_slice(&input.u16().to_le_bytes());
                bytes[12] = input.u8() & 3;
                let place = GuestAddress(at + 0x100 + segment * 16);
                let _ = self.memory.write_slice(&bytes, place);
            }
        }
        let data_at = if data_len > 0x200 {
            address(input)
        } else {
            at + 0x100
        };
        let to_guest = if matches!(code, 0 | 8) { WRITE } else { 0 };
        let base = self.index(input);
        let indirect = kind & 0x80 != 0;
        let last = self.setup.size - 1;
        let next = |step: u16| if indirect { step } else { (base + step) & last };
        let chain = [
            RawDescriptor::from(Descriptor::new(at, 16, NEXT, next(1))),
            RawDescriptor::from(Descriptor::new(data_at, data_len, NEXT | to_guest, next(2))),
            RawDescriptor::from(Descriptor::new(at + 0x3ff, 1, WRITE, 0)),
        ];
        if indirect {
            let table = TABLES + number * 3 * DESCRIPTOR_BYTES;
            for (index, descriptor) in (0..).zip(chain) {
                let place = GuestAddress(table + index * DESCRIPTOR_BYTES);
                let _ = self.memory.write_obj(descriptor, place);
            }
            let whole = RawDescriptor::from(Descriptor::new(table, 48, INDIRECT, 0));
            let _ = self.driver.desc_table().store(base, whole);
        } else {
            for (step, descriptor) in (0..).zip(chain) {
                let place = (base + step) & last;
                let _ = self.driver.desc_table().store(place, descriptor);
            }
        }
        self.offer(base);
    }

    /// The device looks, until all that it has taken is answered; then its doings are judged.
    fn look(&mut self, queue: &mut Queue) -> Verdict {
        let offers = Offers::of(self.memory, &self.setup, self.device.next_avail());
        self.tainted |= offers.touch_themselves;
        let broken_before = self.device.is_broken();
        let before = snapshot(self.memory)?;
        let begin = Instant::now();
        while self.device.turn(queue) || self.device.in_flight() > 0 {
            require!(
                begin.elapsed() < PATIENCE,
                "a hang: {} requests are not answered",
                self.device.in_flight()
            );
            if self.device.in_flight() > 0 {
                queue.wait(Some(Duration::from_millis(100)));
            } else if self.tainted {
                // A ring that answers write to can look full for ever.
                break;
            }
        }
        if self.tainted {
            return Ok(());
        }
        let after = snapshot(self.memory)?;
        let allowed = if broken_before {
            Vec::new()
        } else {
            merged(offers.writable.iter().cloned().chain([self.used_area()]))
        };
        unchanged_elsewhere(&before, &after, &allowed)?;
        self.judge_answers(&offers, &before, &after, broken_before)
    }

    fn used_area(&self) -> Range<u64> {
        used_area(&self.setup)
    }

    fn judge_answers(
        &mut self,
        offers: &Offers,
        before: &Snapshot,
        after: &Snapshot,
        broken_before: bool,
    ) -> Verdict {
        let used = self.setup.used;
        let Some(at) = used.checked_add(2) else {
            return Ok(());
        };
        let (Some(shown), Some(new)) = (before.u16(at), after.u16(at)) else {
            return Ok(());
        };
        // The driver may have written to the index, which is not its own: so the device's is kept here.
        let old = self.used_index;
        // Where nothing has changed and the queue is broken, there was no answer, or nothing tells it from none.
        let unchanged = new == shown;
        let silent =
            unchanged && (self.device.is_broken() || new != old.wrapping_add(offers.count()));
        let answered = if silent { 0 } else { new.wrapping_sub(old) };
        self.used_index = old.wrapping_add(answered);
        require!(
            usize::from(answered) <= offers.heads.len(),
            "{answered} answers to {} requests",
            offers.heads.len()
        );
        require!(
            !(self.device.is_broken() && offers.sound && !broken_before),
            "the queue is broken off, and nothing is wrong with what was offered"
        );
        if !self.device.is_broken() {
            require!(
                usize::from(answered) == offers.heads.len(),
                "{answered} answers to {} requests, and the queue is not broken",
                offers.heads.len()
            );
        }
        let mut left: HashMap<u16, usize> = HashMap::new();
        for &head in &offers.heads {
            *left.entry(head).or_default() += 1;
        }
        for step in 0..answered {
            let slot = old.wrapping_add(step) & (self.setup.size - 1);
            let at = used + 4 + u64::from(slot) * 8;
            let (Some(id), Some(written)) = (after.u32(at), after.u32(at + 4)) else {
                continue;
            };
            let head = u16::try_from(id).map_err(|_| format!("an answer to {id}"))?;
            let count = left.get_mut(&head).filter(|count| **count > 0);
            let count = count.ok_or_else(|| format!("an answer to {head} that nobody asked"))?;
            *count -= 1;
            let most = offers.most_written.get(&head).copied().unwrap_or(0);
            require!(
                u64::from(written) <= most,
                "{written} bytes written for {head}, which offers {most}"
            );
        }
        Ok(())
    }
}

fn descriptor(input: &mut Input<'_>) -> RawDescriptor {
    let (address, len) = (address(input), len(input));
    let (flags, next) = (input.u8(), input.u8());
    // Mostly flags that mean something; rarely a next one beyond the end.
    let flags = u16::from(flags & if flags & 0x80 != 0 { 0x7f } else { 7 });
    RawDescriptor::from(Descriptor::new(address, len, flags, next.into()))
}

fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() % 10 {
        0..=2 => 0x2_0000 + u64::from(input.u16()),
        3 => TABLES + u64::from(input.u8()) * DESCRIPTOR_BYTES,
        4 => REQUESTS + u64::from(input.u16() & 0x7fff),
        5 => 0x10_fe00 + u64::from(input.u16() & 0x3ff),
        6 => 0x3_ff00 + u64::from(input.u16() & 0x1ff),
        7 => u64::from(input.u16()),
        8 => u64::MAX - u64::from(input.u16()),
        _ => input.u64(),
    }
}

fn len(input: &mut Input<'_>) -> u32 {
    match input.u8() % 8 {
        0 => 16,
        1 => 1,
        2 => u32::from(input.u8()) * 512,
        3 => u32::from(input.u8()) * 16,
        4 => u32::from(input.u16()),
        5 => 0,
        6 => u32::MAX - u32::from(input.u8()),
        _ => input.u32(),
    }
}

fn used_area(setup: &Setup) -> Range<u64> {
    area(setup.used, 4 + u64::from(setup.size) * 8 + 2)
}

fn area(start: u64, bytes: u64) -> Range<u64> {
    start..start.saturating_add(bytes)
}

/// What the driver has offered when the device looks.
#[derive(Default)]
struct Offers {
    heads: Vec<u16>,
    /// All that the chains offer to be written to, whatever is wrong with them.
    writable: Vec<Range<u64>>,
    /// Bytes of that, by head.
    most_written: HashMap<u16, u64>,
    /// There is nothing in any of it for which a queue may be broken off.
    sound: bool,
    /// Some of it is a table, or a ring.
    touch_themselves: bool,
}

impl Offers {
    fn of(memory: &GuestMemoryMmap, setup: &Setup, next_avail: u16) -> Self {
        let mut offers = Self::default();
        let size = u64::from(setup.size);
        let rings = [
            area(setup.descriptors, size * DESCRIPTOR_BYTES),
            area(setup.avail, 4 + size * 2 + 2),
            used_area(setup),
        ];
        offers.touch_themselves = (0..3).any(|a| (0..a).any(|b| overlap(&rings[a], &rings[b])));
        let index = read::<2>(memory, setup.avail.saturating_add(2)).map(u16::from_le_bytes);
        let available = index.map_or(0, |index| index.wrapping_sub(next_avail));
        if available > setup.size {
            return offers;
        }
        // Indices are loaded and stored as a whole.
        offers.sound = setup.avail.is_multiple_of(2) && setup.used.is_multiple_of(2);
        let mut tables = rings.to_vec();
        for step in 0..available {
            let slot = next_avail.wrapping_add(step) & (setup.size - 1);
            let at = setup.avail.saturating_add(4 + u64::from(slot) * 2);
            let Some(head) = read::<2>(memory, at).map(u16::from_le_bytes) else {
                break;
            };
            // Twice is one of too many, unless the first was answered at once.
            offers.sound &= !offers.heads.contains(&head);
            offers.heads.push(head);
            offers.sound &= offers.walk(memory, setup, head, &mut tables);
        }
        offers.touch_themselves |= offers
            .writable
            .iter()
            .any(|writable| tables.iter().any(|table| overlap(table, writable)));
        // The used ring is written to as well.
        let indirect = &tables[rings.len()..];
        offers.touch_themselves |= indirect.iter().any(|table| overlap(table, &rings[2]));
        // Where the rings are not in the memory nothing is taken.
        let whole = |ring: &Range<u64>| {
            let inside = |&(start, bytes): &(u64, usize)| {
                start <= ring.start && ring.end <= start + bytes as u64
            };
            REGIONS.iter().any(inside)
        };
        if !rings.iter().all(whole) {
            offers.sound = false;
            offers.heads.clear();
        }
        offers
    }

    fn count(&self) -> u16 {
        u16::try_from(self.heads.len()).unwrap_or(u16::MAX)
    }

    /// Notes what a chain offers; whether it keeps all rules.
    fn walk(
        &mut self,
        memory: &GuestMemoryMmap,
        setup: &Setup,
        head: u16,
        tables: &mut Vec<Range<u64>>,
    ) -> bool {
        let (mut table, mut entries) = (setup.descriptors, u64::from(setup.size));
        let mut index = u64::from(head);
        let (mut bytes, mut written, mut status_at) = (0_u64, 0_u64, None);
        let (mut sound, mut ended, mut nested, mut steps) = (true, false, false, 0);
        while !ended && steps <= MOST {
            let at = table.saturating_add(index * DESCRIPTOR_BYTES);
            let descriptor = read::<16>(memory, at).filter(|_| index < entries);
            let Some(descriptor) = descriptor else { break };
            let (start, rest) = descriptor.split_first_chunk().expect("16 bytes");
            let start = u64::from_le_bytes(*start);
            let (len, rest) = rest.split_first_chunk().expect("8 bytes");
            let len = u64::from(u32::from_le_bytes(*len));
            let flags = u16::from_le_bytes([rest[0], rest[1]]);
            if flags & INDIRECT != 0 {
                if nested {
                    break;
                }
                let fits = len.is_multiple_of(DESCRIPTOR_BYTES) && len <= MOST * DESCRIPTOR_BYTES;
                sound &= flags & NEXT == 0 && fits && all_there(memory, start, len);
                nested = true;
                (table, entries, index) = (start, len / DESCRIPTOR_BYTES, 0);
                tables.push(area(start, len));
                continue;
            }
            steps += 1;
            bytes += len;
            let writable = flags & WRITE != 0;
            sound &= writable || written == 0;
            if writable && len > 0 {
                self.writable.push(area(start, len));
                written += len;
                status_at = start.checked_add(len - 1);
            }
            ended = flags & NEXT == 0;
            index = u16::from_le_bytes([rest[2], rest[3]]).into();
        }
        let most = self.most_written.entry(head).or_default();
        *most = written.max(*most);
        let told = status_at.is_some_and(|at| read::<1>(memory, at).is_some());
        sound && ended && told && steps <= MOST && bytes <= u64::from(u32::MAX)
    }
}

fn all_there(memory: &GuestMemoryMmap, start: u64, len: u64) -> bool {
    let len = usize::try_from(len.min(MOST * DESCRIPTOR_BYTES)).unwrap_or(0);
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(start)).is_ok()
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn read<const N: usize>(memory: &GuestMemoryMmap, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(at)).ok()?;
    Some(bytes)
}

/// Sorted, without overlaps.
fn merged(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// The whole memory at one moment.
struct Snapshot(Vec<(u64, Vec<u8>)>);

fn snapshot(memory: &GuestMemoryMmap) -> Result<Snapshot, String> {
    let copy = |(start, bytes)| {
        let mut copy = vec![0; bytes];
        let read = memory.read_slice(&mut copy, GuestAddress(start));
        read.map(|()| (start, copy))
            .map_err(|error| error.to_string())
    };
    let regions: Result<Vec<_>, String> = REGIONS.into_iter().map(copy).collect();
    Ok(Snapshot(regions?))
}

impl Snapshot {
    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.0.iter().find_map(|(start, bytes)| {
            let at = usize::try_from(at.checked_sub(*start)?).ok()?;
            bytes.get(at..)?.first_chunk().copied()
        })
    }

    fn u16(&self, at: u64) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: u64) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }
}

fn unchanged_elsewhere(before: &Snapshot, after: &Snapshot, allowed: &[Range<u64>]) -> Verdict {
    const STEP: usize = 256;
    for ((start, before), (_, after)) in before.0.iter().zip(&after.0) {
        let pairs = before.chunks(STEP).zip(after.chunks(STEP));
        for (chunk, (old, new)) in (0_u64..).zip(pairs) {
            if old == new {
                continue;
            }
            let changed = (0_u64..).zip(old.iter().zip(new));
            for (offset, _) in changed.filter(|(_, (old, new))| old != new) {
                let at = start + chunk * STEP as u64 + offset;
                let index = allowed.partition_point(|range| range.end <= at);
                let offered = allowed.get(index).is_some_and(|range| range.contains(&at));
                require!(offered, "a write to {at:#x}, which nobody has offered");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Guards the judge: it must see a good request answered, and a write elsewhere.
    use super::*;

    #[test]
    fn a_write_elsewhere_is_seen() {
        let before = Snapshot(vec![(0x1000, vec![CANARY; 4096])]);
        let mut after = Snapshot(vec![(0x1000, vec![CANARY; 4096])]);
        after.0[0].1[700] = 1;
        let around = merged([0x1200..0x12bc, 0x12bd..0x1400].into_iter());
        let told = unchanged_elsewhere(&before, &after, &around).unwrap_err();
        assert!(told.contains("0x12bc"), "{told}");
        let over = merged([0x1200..0x12bc, 0x1280..0x1400].into_iter());
        unchanged_elsewhere(&before, &after, &over).unwrap();
    }

    /// One request by hand: a read of a sector to 0x20000.
    #[test]
    fn a_good_request_is_answered_and_judged() {
        // Size 16; one change, a request of kind read, sector 0, two sectors, number 0, data at 0x20000, descriptors from 0.
        let input = [4, 1, 5, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0];
        virtqueue(&input).unwrap();
        BENCH.with_borrow(|bench| {
            let memory = bench.as_ref().unwrap().memory.guest();
            let status: u8 = memory.read_obj(GuestAddress(REQUESTS + 0x3ff)).unwrap();
            assert_eq!(status, 0);
            let data: u8 = memory.read_obj(GuestAddress(0x2_0000)).unwrap();
            assert_eq!(data, 0, "an empty disk reads as zero");
        });
    }
}

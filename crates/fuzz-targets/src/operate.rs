//! A device over a damaged image: opened, used, closed.

use std::rc::Rc;

use urus_engine::request::RequestKind;
use urus_engine::storage::FileId;
use urus_engine::{Control, LayerFormat, LayerSpec, Options};
use urus_format::{Header, incompatible};
use urus_sim::machine::{Driving, Machine};
use urus_sim::model::Model;
use urus_sim::rng::Rng;
use urus_sim::stamp::{foreign_stamp, stamped};
use urus_sim::world::{FileSpec, IMAGE, SimConfig, SimWorld};

use crate::Verdict;
use crate::bases::Base;
use crate::input::Input;
use crate::mutate::mutated;
use crate::require;
use crate::view::{View, look, protected};

/// What an image may grow by.
const ROOM: u64 = 16 << 20;
/// Requests of one input.
const MOST_REQUESTS: u32 = 48;
/// Bytes of one request, and of all of them.
const REQUEST_BYTES: u64 = 2 << 20;
const ALL_BYTES: u64 = 12 << 20;
/// A guest's own data has versions from here on.
const FIRST_VERSION: u64 = 1 << 48;
const SECTOR: usize = 512;

/// Opens a damaged image, sends it requests, and closes it.
///
/// # Errors
/// What is wrong.
pub fn operate(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    let way = Way::read(&mut input);
    let image = mutated(&mut input);
    let base = Rc::clone(&image.base);
    let Ok(header) = Header::parse(&image.bytes, image.bytes.len() as u64) else {
        require!(
            image.changes > 0,
            "{}: a valid header is refused",
            base.name
        );
        return Ok(());
    };
    let backed = header.backing.is_some();
    if backed && base.behind.is_none() {
        // No such file: refused before the engine is asked.
        return Ok(());
    }
    let behind = base.behind.as_deref().filter(|_| backed);
    let mut chain = vec![Layer {
        file: on_disk(&base.files[0], image.bytes),
        header: Some(header),
    }];
    if backed {
        chain.push(behind_layer(&base));
    }
    Session {
        name: base.name,
        behind,
        valid: image.changes == 0,
        options: options(&base, way),
    }
    .run(chain, way, &mut input)
}

/// A file of a chain.
pub(crate) struct Layer {
    pub(crate) file: FileSpec,
    /// Nothing for raw.
    pub(crate) header: Option<Header>,
}

/// How an input wants its device.
#[derive(Clone, Copy)]
pub(crate) struct Way {
    seed: u64,
    pub(crate) read_only: bool,
    /// Closed at the end, or just let go of.
    closed: bool,
    queues: usize,
    depth: usize,
    no_cache: bool,
}

impl Way {
    pub(crate) fn read(input: &mut Input<'_>) -> Self {
        let (seed, shape) = (u64::from(input.u8()), input.u8());
        Self {
            seed,
            read_only: shape & 7 == 7,
            closed: shape >> 3 & 3 != 3,
            queues: 1 + usize::from(shape >> 5 & 1),
            depth: if shape & 0x40 != 0 { 2 } else { 16 },
            no_cache: shape & 0x80 != 0,
        }
    }
}

/// These bytes where the base's lay.
pub(crate) fn on_disk(base: &FileSpec, bytes: Vec<u8>) -> FileSpec {
    let capacity = bytes.len() as u64 + ROOM;
    FileSpec {
        contents: bytes,
        properties: base.properties,
        writable: true,
        capacity,
    }
}

fn behind_layer(base: &Base) -> Layer {
    let file = base.files[1].clone();
    let bytes = &file.contents;
    let header = (!base.raw_behind)
        .then(|| Header::parse(bytes, bytes.len() as u64).expect("bases are valid"));
    Layer { file, header }
}

pub(crate) fn options(base: &Base, way: Way) -> Options {
    let mut options = Options::default();
    options.read_only = way.read_only;
    options.discard = base.discard;
    options.l2_cache_bytes = if way.no_cache { 0 } else { base.cache_bytes };
    options
}

/// A request in flight, and the sectors that it touches.
struct Sent {
    token: u64,
    what: What,
    offset: u64,
    len: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    Read,
    Write(Vec<u8>),
    Zero,
    Discard,
    Other,
}

impl What {
    fn name(&self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write(_) => "write",
            Self::Zero => "write zeroes",
            Self::Discard => "discard",
            Self::Other => "flush or status",
        }
    }
}

impl Sent {
    fn sectors(&self) -> std::ops::Range<usize> {
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        at(self.offset / 512)..at(self.offset.saturating_add(self.len).div_ceil(512))
    }

    fn changes(&self) -> bool {
        matches!(self.what, What::Write(_) | What::Zero | What::Discard)
    }
}

/// What a sector of the disk may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// What the model says.
    Exactly,
    /// That, or zeroes: it was discarded.
    OrZero,
    /// Anything: a request failed, or two were under way at once.
    Nothing,
}

/// What the disk holds, as far as it is known.
struct Disk {
    bytes: Vec<u8>,
    known: Vec<Known>,
}

impl Disk {
    fn new(mut bytes: Vec<u8>) -> Self {
        bytes.truncate(bytes.len() / SECTOR * SECTOR);
        let known = vec![Known::Exactly; bytes.len() / SECTOR];
        Self { bytes, known }
    }

    fn mark(&mut self, sectors: std::ops::Range<usize>, known: Known) {
        let end = sectors.end.min(self.known.len());
        for state in &mut self.known[sectors.start.min(end)..end] {
            *state = (*state).max(known);
        }
    }

    /// These bytes were written.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).expect("inside the disk");
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        // Sectors of which only a part was written stay as unknown as they were.
        let end = at + bytes.len();
        let whole = at.div_ceil(SECTOR)..end / SECTOR;
        if whole.start < whole.end {
            self.known[whole].fill(Known::Exactly);
        }
        for edge in [at, end] {
            // Old, new and zeroes side by side: too much to keep in mind.
            if !edge.is_multiple_of(SECTOR) && self.known[edge / SECTOR] == Known::OrZero {
                self.known[edge / SECTOR] = Known::Nothing;
            }
        }
    }

    /// Whether these bytes may be read there; from then on they are known.
    fn read(&mut self, offset: u64, bytes: &[u8]) -> Verdict {
        let start = usize::try_from(offset).expect("inside the disk");
        let mut at = start;
        while at < start + bytes.len() {
            let sector = at / SECTOR;
            let end = ((sector + 1) * SECTOR).min(start + bytes.len());
            let read = &bytes[at - start..end - start];
            let held = &mut self.bytes[at..end];
            let zero = read.iter().all(|byte| *byte == 0);
            match self.known[sector] {
                Known::Exactly if read != held => {
                    let found = match foreign_stamp(read) {
                        Some((lba, version)) => format!("sector {lba}, version {version:#x}"),
                        None if zero => "zeroes".to_owned(),
                        None => format!("{:02x?}...", &read[..read.len().min(16)]),
                    };
                    let expected = foreign_stamp(held);
                    return Err(format!(
                        "sector {sector} reads as {found}, not {expected:x?}"
                    ));
                }
                Known::OrZero if read != held && !zero => {
                    return Err(format!("discarded sector {sector} reads as neither"));
                }
                Known::OrZero if end - at == SECTOR => {
                    held.copy_from_slice(read);
                    self.known[sector] = Known::Exactly;
                }
                _ => {}
            }
            at = end;
        }
        Ok(())
    }

    /// The disk has grown; what is new reads as zeroes where `clean`.
    fn resize(&mut self, size: usize, clean: bool) {
        let known = if clean {
            Known::Exactly
        } else {
            Known::Nothing
        };
        self.bytes.resize(size, 0);
        self.known.resize(size / SECTOR, known);
    }
}

impl Known {
    fn max(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, _) | (_, Self::Nothing) => Self::Nothing,
            (Self::OrZero, _) | (_, Self::OrZero) => Self::OrZero,
            _ => Self::Exactly,
        }
    }
}

/// One device's life.
pub(crate) struct Session<'a> {
    pub(crate) name: &'static str,
    /// What shows where the image has nothing.
    pub(crate) behind: Option<&'a [u8]>,
    /// Nothing was damaged: everything has to work.
    pub(crate) valid: bool,
    pub(crate) options: Options,
}

impl Session<'_> {
    pub(crate) fn run(self, chain: Vec<Layer>, way: Way, input: &mut Input<'_>) -> Verdict {
        let Some(header) = chain[0].header.clone() else {
            return Ok(());
        };
        let initial = chain[0].file.contents.clone();
        let before = look(&initial, self.behind);
        // One that was left open is repaired first.
        let left_open = header.incompatible & incompatible::DIRTY != 0;
        require!(
            !self.valid || before.is_sound() || left_open && !before.unreadable,
            "{}: valid, and not sound",
            self.name
        );
        let mut rng = Rng::new(way.seed);
        let mut files = Vec::new();
        let mut layers = Vec::new();
        for (number, layer) in (0..).zip(chain) {
            let format = layer.header.map_or(LayerFormat::Raw, |header| {
                LayerFormat::Qcow2(Box::new(header))
            });
            layers.push(LayerSpec {
                file: FileId(number),
                name: format!("file {number}"),
                format,
            });
            files.push(layer.file);
        }
        let world = SimWorld::new(way.seed, SimConfig::random(&mut rng), files);
        let driving = Driving {
            queues: way.queues,
            depth: way.depth,
            spurious: false,
            errors: true,
            outlives: false,
        };
        let model = Model::new(Vec::new(), FIRST_VERSION);
        let opened = Machine::open(&world, layers, self.options.clone(), model, driving, rng);
        let machine = match opened {
            Ok(machine) => machine,
            Err(error) => {
                world.settle();
                return self.refused(&header, &world, &initial, &before, &error);
            }
        };
        let guest = before.guest.clone().filter(|_| before.is_sound());
        let mut run = Run {
            machine,
            size: header.size & !511,
            cluster_bits: header.cluster_bits,
            disk: guest.map(Disk::new),
            sent: Vec::new(),
            failures: 0,
            version: FIRST_VERSION,
            left: ALL_BYTES,
            valid: self.valid,
            say: say(),
        };
        if run.say {
            eprintln!("{}: {} bytes, {header:?}", self.name, initial.len());
            eprintln!("{:?}", before.report.violations);
        }
        run.script(input)?;
        run.drain()?;
        if self.valid && run.failures > 0 && !self.options.read_only {
            return Err(format!("{}: {} requests failed", self.name, run.failures));
        }
        let closed = way.closed && run.close()?;
        let Run { machine, disk, .. } = run;
        drop(machine);
        world.settle();
        complaints(&world)?;
        let after = world.contents(IMAGE).bytes().to_vec();
        if self.options.read_only {
            require!(after == initial, "a read-only device has changed its image");
            return Ok(());
        }
        let now = look(&after, self.behind);
        metadata_is_no_data(&header, (&initial, &before), (&after, &now))?;
        if before.is_sound() {
            self.sound(closed, disk, &before, &now)?;
        }
        Ok(())
    }

    /// The device did not open: then nothing was changed, unless a repair had to come first.
    fn refused(
        &self,
        header: &Header,
        world: &SimWorld,
        initial: &[u8],
        before: &View,
        error: &str,
    ) -> Verdict {
        complaints(world)?;
        let supported = header.check_supported(!self.options.read_only).is_ok();
        let cluster = header.geometry().cluster_bytes();
        let aligned = {
            let alignment = world.contents(IMAGE).is_fixed();
            !alignment || cluster >= 4096
        };
        require!(
            !(self.valid && supported && aligned),
            "{}: a valid image is refused: {error}",
            self.name
        );
        let after = world.contents(IMAGE).bytes().to_vec();
        let repaired = header.incompatible & incompatible::DIRTY != 0 && !self.options.read_only;
        if !repaired {
            require!(after == initial, "refused ({error}), and changed");
            return Ok(());
        }
        let now = look(&after, self.behind);
        require!(
            now.report.violation_count <= before.report.violation_count,
            "refused ({error}), and made worse by the repair: {:?}",
            now.report.violations
        );
        Ok(())
    }

    /// It was sound when it was opened.
    fn sound(&self, closed: bool, disk: Option<Disk>, before: &View, now: &View) -> Verdict {
        require!(
            now.report.is_sound(),
            "{}: sound before, not sound after: {:?}",
            self.name,
            now.report.violations
        );
        require!(
            now.snapshots == before.snapshots,
            "{}: a snapshot has changed",
            self.name
        );
        if !closed {
            return Ok(());
        }
        require!(
            now.is_sound() && now.report.leak_count <= before.report.leak_count,
            "{}: closed, and dirty or with {} leaks, {} before: {:?}",
            self.name,
            now.report.leak_count,
            before.report.leak_count,
            now.report.leaks
        );
        let (Some(mut disk), Some(guest)) = (disk, &now.guest) else {
            return Ok(());
        };
        require!(
            guest.len() / SECTOR * SECTOR == disk.bytes.len(),
            "{}: the disk has {} bytes, not {}",
            self.name,
            guest.len(),
            disk.bytes.len()
        );
        let whole = disk.bytes.len();
        disk.read(0, &guest[..whole])
            .map_err(|error| format!("{}: after closing: {error}", self.name))
    }
}

/// What no driver's user may do. A damaged entry may lead anywhere in the address space, and the file system says no.
fn complaints(world: &SimWorld) -> Verdict {
    let all = world.complaints();
    let wild = |complaint: &&String| !complaint.contains("a change that ends at");
    match all.iter().find(wild) {
        Some(complaint) => Err(format!("the storage complains: {complaint}")),
        None => Ok(()),
    }
}

/// What was metadata and still is holds nothing that the guest wrote.
fn metadata_is_no_data(
    header: &Header,
    (initial, before): (&[u8], &View),
    (after, now): (&[u8], &View),
) -> Verdict {
    let cluster = 1usize << header.cluster_bits;
    require!(
        Header::parse(after, after.len() as u64).is_ok(),
        "the header does not parse any more"
    );
    let still = protected(after, &now.report, cluster);
    for at in protected(initial, &before.report, cluster) {
        if still.binary_search(&at).is_err() {
            continue;
        }
        let sectors = after[at..after.len().min(at + cluster)].chunks_exact(SECTOR);
        for (number, sector) in sectors.enumerate() {
            if let Some((lba, version)) = foreign_stamp(sector)
                && version >= FIRST_VERSION
            {
                return Err(format!(
                    "guest sector {lba} lies in metadata, host offset {:#x}, {:?}",
                    at + number * SECTOR,
                    now.report.owners.at(at as u64)
                ));
            }
        }
    }
    Ok(())
}

/// A device at work.
struct Run {
    machine: Machine,
    size: u64,
    cluster_bits: u32,
    /// Where the image was sound.
    disk: Option<Disk>,
    sent: Vec<Sent>,
    failures: u32,
    version: u64,
    left: u64,
    /// The image is as some writer left it. (In a damaged one there can be data past the end of the disk, which shows
    /// when it grows.)
    valid: bool,
    /// Tells people what is done ([`SAY`]).
    say: bool,
}

/// With this variable in its environment a run tells every request and reply.
const SAY: &str = "URUS_FUZZ_SAY";

/// Whether somebody wants to be told what is done.
pub(crate) fn say() -> bool {
    std::env::var_os(SAY).is_some()
}

/// Errors of the machine that are no answers of the device.
fn is_violation(error: &str) -> bool {
    ["a hang", "a livelock", "a reply to a request"]
        .iter()
        .any(|start| error.starts_with(start))
}

impl Run {
    fn script(&mut self, input: &mut Input<'_>) -> Verdict {
        for _ in 0..MOST_REQUESTS {
            if input.is_empty() {
                break;
            }
            let op = input.u8();
            match op % 16 {
                0..=3 => self.send(op, What::Read, input)?,
                4..=8 => self.send(op, What::Write(Vec::new()), input)?,
                9 => self.send(op, What::Zero, input)?,
                10 | 11 => self.send(op, What::Discard, input)?,
                12 => self.send(op, What::Other, input)?,
                13 => self.resize(input)?,
                14 => self.pause(op & 0x10 != 0)?,
                _ => self.drain()?,
            }
            // Bursts and single requests.
            if op & 0x80 == 0 {
                self.drain()?;
            }
        }
        Ok(())
    }

    /// Where, and how much: inside the disk, at its end, a little past it; aligned and not.
    fn range(&mut self, input: &mut Input<'_>) -> (u64, u64) {
        let shape = input.u8();
        let unit = if shape & 1 == 0 { 512 } else { 1 };
        let offset = match shape >> 1 & 3 {
            0 => u64::from(input.u16()) * unit,
            1 => u64::from(input.u16()) << self.cluster_bits,
            2 => self.size.saturating_sub(u64::from(input.u16()) * unit),
            _ => u64::from(input.u32()) * unit,
        };
        let offset = offset % (self.size + 1);
        let len = match shape >> 3 & 3 {
            0 => u64::from(input.u8()) * unit,
            1 => u64::from(input.u8() % 16) << self.cluster_bits,
            2 => u64::from(input.u16()) * unit,
            _ => 512,
        };
        let inside = self.size.saturating_sub(offset).max(1);
        // Most ranges end in the disk, so that something is done.
        let len = if shape & 0x80 == 0 {
            len.min(inside)
        } else {
            len
        };
        let len = len.min(REQUEST_BYTES).min(self.left);
        self.left -= len;
        (offset, len)
    }

    fn send(&mut self, op: u8, what: What, input: &mut Input<'_>) -> Verdict {
        let (offset, len) = self.range(input);
        let (unmap, fua) = (op & 0x10 != 0, op & 0x20 != 0);
        let bytes = usize::try_from(len).expect("limited");
        let (kind, what) = match what {
            What::Read => {
                let memory = self.machine.guest_memory(vec![0xa5; bytes]);
                (RequestKind::Read { offset, memory }, What::Read)
            }
            What::Write(_) => {
                self.version += 1;
                let first = offset / 512;
                let mut data = stamped(first, (offset + len).div_ceil(512) - first, self.version);
                data.drain(..usize::try_from(offset % 512).expect("small"));
                data.truncate(bytes);
                let memory = self.machine.guest_memory(data.clone());
                (
                    RequestKind::Write {
                        offset,
                        memory,
                        fua,
                    },
                    What::Write(data),
                )
            }
            What::Zero => (
                RequestKind::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    fua,
                },
                What::Zero,
            ),
            What::Discard => (RequestKind::Discard { offset, len }, What::Discard),
            What::Other if unmap => (RequestKind::Flush, What::Other),
            What::Other => (RequestKind::BlockStatus { offset, len }, What::Other),
        };
        if self.say {
            eprintln!("{}: {offset:#x}, {len:#x}", what.name());
        }
        if self.sent.len() >= 12 {
            self.drain()?;
        }
        let Some(token) = self.machine.submit_kind(kind) else {
            // Full: the request is lost, and was never sent.
            return self.drain();
        };
        self.sent.push(Sent {
            token,
            what,
            offset,
            len,
        });
        Ok(())
    }

    /// Takes all replies, and judges them.
    fn drain(&mut self) -> Verdict {
        self.machine.drain()?;
        let mut replies = std::mem::take(&mut self.machine.replies);
        let sent = std::mem::take(&mut self.sent);
        require!(
            replies.len() == sent.len(),
            "{} replies to {} requests",
            replies.len(),
            sent.len()
        );
        for (number, request) in sent.iter().enumerate() {
            let at = replies
                .iter()
                .position(|(token, ..)| *token == request.token)
                .ok_or_else(|| format!("no reply to {:?}", request.what))?;
            let (_, result, memory) = replies.swap_remove(at);
            if self.say {
                eprintln!(
                    "  {} at {:#x}: {result:?}",
                    request.what.name(),
                    request.offset
                );
            }
            let inside = request
                .offset
                .checked_add(request.len)
                .is_some_and(|end| end <= self.size);
            if !inside && request.what != What::Other {
                require!(
                    result.is_err(),
                    "a request past the end of {} bytes succeeded",
                    self.size
                );
                continue;
            }
            if let Err(error) = &result
                && inside
                && !error.contains("no space left")
            {
                self.failures += 1;
            }
            let Some(disk) = &mut self.disk else { continue };
            let range = request.sectors();
            let overlapped = sent.iter().enumerate().any(|(other, sent)| {
                let theirs = sent.sectors();
                other != number
                    && sent.changes()
                    && theirs.start < range.end
                    && range.start < theirs.end
            });
            let wrong =
                |error: String| format!("{error} ({} bytes at {:#x})", request.len, request.offset);
            match &request.what {
                What::Other => {}
                What::Read => {
                    let bytes = memory.ok_or("a read gave no memory back")?.to_vec();
                    if result.is_ok() && !overlapped {
                        disk.read(request.offset, &bytes).map_err(wrong)?;
                    }
                }
                _ if overlapped || result.is_err() => disk.mark(range, Known::Nothing),
                What::Write(data) => disk.write(request.offset, data),
                What::Zero => {
                    let zeroes = vec![0; usize::try_from(request.len).expect("limited")];
                    disk.write(request.offset, &zeroes);
                }
                What::Discard => disk.mark(range, Known::OrZero),
            }
        }
        Ok(())
    }

    /// What the device answers, unless the machine found something wrong.
    fn control(
        &mut self,
        control: impl FnOnce(urus_engine::ControlReply) -> Control,
    ) -> Result<bool, String> {
        match self.machine.control(control) {
            Ok(()) => Ok(true),
            Err(error) if is_violation(&error) => Err(error),
            Err(_) => Ok(false),
        }
    }

    fn resize(&mut self, input: &mut Input<'_>) -> Verdict {
        self.drain()?;
        let size = match input.u8() % 4 {
            0 => input.u64(),
            1 => self.size,
            2 => self
                .size
                .saturating_add(u64::from(input.u16()) << self.cluster_bits),
            _ => self.size.saturating_add(u64::from(input.u8()) * 512),
        };
        let resized = self.control(|reply| Control::Resize(size, reply))?;
        if self.say {
            eprintln!("resize to {size:#x}: {resized}");
        }
        if resized {
            self.size = size.next_multiple_of(512);
            match usize::try_from(self.size) {
                Ok(size) if size <= 8 << 20 => {
                    if let Some(disk) = &mut self.disk {
                        disk.resize(size, self.valid);
                    }
                }
                _ => self.disk = None,
            }
        }
        Ok(())
    }

    /// Pauses, and goes on; maybe with everything read anew.
    fn pause(&mut self, anew: bool) -> Verdict {
        self.drain()?;
        if !self.control(Control::Pause)? {
            return Ok(());
        }
        let image = self.machine.image();
        let header = Header::parse(&image, image.len() as u64)
            .map_err(|error| format!("the header does not parse any more: {error}"))?;
        let header = anew.then(|| Box::new(header));
        let resumed = self.control(|reply| Control::Resume(header, reply))?;
        require!(
            resumed || self.disk.is_none(),
            "a sound image was paused, and does not resume"
        );
        Ok(())
    }

    /// Whether closing succeeded.
    fn close(&mut self) -> Result<bool, String> {
        match self.machine.close() {
            Ok(()) => Ok(true),
            Err(error) if is_violation(&error) => Err(error),
            Err(_) => Ok(false),
        }
    }
}

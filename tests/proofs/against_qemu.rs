//! urus and QEMU on one image in turn, by random scripts: equal contents, equal maps, checks that find nothing and agree,
//! and each opens what the other closed. And crowds: many connections at once on one image, the workloads in which Cloud
//! Hypervisor lost data (#8621, #8624), at size.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use urus_sim::rng::Rng;
use urus_tests::load::{self, Habits, Weights};
use urus_tests::nbd::{Client, Command};
use urus_tests::script::{self, Model, Step};
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Scratch, content, qemu, urus};

use crate::Arguments;
use crate::campaign::{Plan, Start, guarded, leaks, read_all};
use crate::tally::Tally;

const FIGURES: [&str; 7] = [
    "turns", "images", "steps", "resizes", "maps", "crowds", "requests",
];

/// What many connections work on at once.
const CROWDS: [Plan; 5] = [
    Plan::new("crowd 64k over zlib", 64 * KIB, Start::OverZlib),
    Plan::new("crowd 64k", 64 * KIB, Start::Empty),
    Plan::new("crowd 4k over raw", 4 * KIB, Start::OverRaw),
    Plan::new("crowd 1k, few L2 slices", KIB, Start::OverZlib)
        .served("--num-queues 8 --l2-cache-size 65536"),
    Plan::new("crowd 64k compressed, direct", 64 * KIB, Start::Compressed)
        .served("--num-queues 8 --cache none"),
];

/// The part `qemu`.
pub(crate) fn run(arguments: &Arguments) -> Tally {
    /// Images between two crowds.
    const BETWEEN: u64 = 5;
    let mut tally = Tally::new("qemu", arguments.seed, arguments.budget(120), &FIGURES);
    let only = |name: &str| arguments.plan.as_ref().is_none_or(|plan| plan == name);
    let mut number = 0;
    while tally.goes_on() {
        let seed = arguments.seed.wrapping_add(number);
        let crowd = usize::try_from(number / (BETWEEN + 1)).expect("small") % CROWDS.len();
        let crowd = &CROWDS[crowd];
        let chosen = CROWDS
            .iter()
            .find(|plan| arguments.plan.is_some() && only(plan.name));
        let crowd = chosen.unwrap_or(crowd);
        let a_crowd = chosen.is_some() || number % (BETWEEN + 1) == BETWEEN && only(crowd.name);
        let outcome = if a_crowd {
            guarded("qemu", crowd.name, seed, |scratch, rng| {
                self::crowd(crowd, scratch, rng, arguments, &mut tally)
            })
        } else {
            guarded("qemu", "in turn", seed, |scratch, rng| {
                in_turn(scratch, rng, arguments, &mut tally)
            })
        };
        tally.violations.extend(outcome.err());
        number += 1;
    }
    tally
}

/// An image of the matrix.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster: u64,
    refcount_order: u64,
    version: u32,
    start: Content,
    snapshot: bool,
    size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Compressed,
    Zstd,
    OverRaw,
    OverQcow2,
    OverCompressed,
}

impl Shape {
    fn draw(rng: &mut Rng) -> Self {
        use Content::{Compressed, Empty, OverCompressed, OverQcow2, OverRaw, Zstd};
        let version = if rng.chance(64) { 2 } else { 3 };
        let refcount_order = if version == 2 { 4 } else { rng.below(7) };
        let mut start = [
            Empty,
            Empty,
            Compressed,
            Zstd,
            OverRaw,
            OverQcow2,
            OverCompressed,
        ][rng.index(7)];
        if start == Zstd && version == 2 {
            start = Compressed;
        }
        let packed = matches!(start, Compressed | Zstd);
        let cluster = 1 << (9 + rng.below(13));
        Self {
            cluster,
            refcount_order,
            version,
            start,
            // The active table and the snapshot must be countable, and so the compressed clusters that share one place.
            snapshot: rng.chance(80) && refcount_order >= if packed { 4 } else { 1 },
            size: (cluster * 60).clamp(2 * MIB, 16 * MIB) + rng.below(8) * 512,
        }
    }

    fn is_overlay(self) -> bool {
        use Content::{OverCompressed, OverQcow2, OverRaw};
        matches!(self.start, OverRaw | OverQcow2 | OverCompressed)
    }

    fn options(self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let (cluster, width) = (self.cluster, 1_u64 << self.refcount_order);
        let zstd = if self.start == Content::Zstd {
            ",compression_type=zstd"
        } else {
            ""
        };
        format!("compat={compat},cluster_size={cluster},refcount_bits={width}{zstd}")
    }

    /// Makes the image, and says what it holds.
    fn build(self, scratch: &Scratch, rng: &mut Rng) -> Model {
        let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw-source"));
        let mut model = Model::zeroes(self.size);
        if self.start == Content::Empty {
            qemu::create(&image, &self.options(), self.size);
            return model;
        }
        // Shorter than the disk, or as long.
        let length = self.size / 512 * (2 + rng.below(3)) / 4 * 512;
        let bytes = content::compressible(rng.next_u64(), usize::try_from(length).expect("small"));
        std::fs::write(&raw, &bytes).expect("writing a raw file");
        let own = matches!(self.start, Content::Compressed | Content::Zstd);
        let (name, pack) = if own {
            ("image.qcow2", "-c")
        } else if self.start == Content::OverCompressed {
            ("base.qcow2", "-c")
        } else {
            ("base.qcow2", "")
        };
        if self.start != Content::OverRaw {
            let options = if own {
                self.options()
            } else {
                format!("cluster_size={}", 1 << (9 + rng.below(13)))
            };
            let convert = qemu::img("convert -f raw -O qcow2 -o").arg(options);
            convert.words(pack).arg(&raw).arg(scratch.file(name)).ok();
        }
        match self.start {
            Content::OverRaw => {
                qemu::create_overlay(&image, &self.options(), "raw-source", "raw");
            }
            _ if own => {}
            _ => qemu::create_overlay(&image, &self.options(), "base.qcow2", "qcow2"),
        }
        qemu::img("resize -q -f qcow2")
            .arg(&image)
            .arg(self.size.to_string())
            .ok();
        let mut whole = bytes;
        whole.resize(usize::try_from(self.size).expect("small"), 0);
        model = Model::holding(whole);
        model
    }
}

/// One image that changes hands several times.
fn in_turn(
    scratch: &Scratch,
    rng: &mut Rng,
    arguments: &Arguments,
    tally: &mut Tally,
) -> Result<(), String> {
    let shape = Shape::draw(rng);
    let (image, raw) = (scratch.file("image.qcow2"), scratch.file("raw"));
    let context = |text: String| format!("{shape:?}: {text}");
    let mut model = shape.build(scratch, rng);
    let mut size = shape.size;
    tally.add("images", 1);
    if shape.snapshot {
        let steps = script::random(rng.next_u64(), size, shape.cluster, 15);
        qemu::io_file(&image, &script::commands(&steps));
        model.follow(&steps);
        model = settled(&model, &image, &raw, &context(String::new()));
        qemu::img("snapshot -c then").arg(&image).ok();
    }
    let then = model.clone();
    for turn in 0..6 {
        let steps = script::random(rng.next_u64(), size, shape.cluster, 12 + rng.index(30));
        let ours = rng.chance(150);
        let driver = arguments.driver(turn);
        let who = if ours { driver.name() } else { "QEMU" };
        let context = |text: String| context(format!("turn {turn} by {who}: {text}"));
        if rng.chance(64) && !(shape.snapshot && shape.version == 2) {
            size = resize(&image, &raw, shape, ours, &mut model, rng).map_err(context)?;
            tally.add("resizes", 1);
            // The script was made for another size.
            let steps = script::random(rng.next_u64(), size, shape.cluster, 10);
            by_urus(&image, driver, &steps, &mut model, rng).map_err(context)?;
        } else if ours {
            by_urus(&image, driver, &steps, &mut model, rng).map_err(context)?;
        } else {
            qemu::io_file(&image, &script::commands(&steps));
            model.follow(&steps);
        }
        tally.add("steps", steps.len() as u64);
        // QEMU's reading is held against the model, and becomes what must be there; ours against QEMU's.
        model = settled(&model, &image, &raw, &context(String::new()));
        if model.bytes() != read_in_process(&image).map_err(context)? {
            return Err(context("urus and QEMU read different contents".to_owned()));
        }
        none_leaked(&image).map_err(context)?;
        equal_maps(&image).map_err(context)?;
        equal_statuses(&image, rng).map_err(context)?;
        if rng.chance(64) {
            equal_statuses_over_nbd(&image, driver, rng).map_err(context)?;
        }
        tally.add("maps", 1);
        tally.add("turns", 1);
    }
    if shape.snapshot {
        let convert = qemu::img("convert -f qcow2 -O raw -l then").arg(&image);
        convert.arg(&raw).ok();
        then.assert_equals_file(&raw, &context("the snapshot".to_owned()));
        qemu::img("snapshot -d then").arg(&image).ok();
        none_leaked(&image).map_err(context)?;
    }
    Ok(())
}

/// The image as QEMU reads it, which must be one of what the model allows; from now on it must be exactly this.
fn settled(model: &Model, image: &Path, raw: &Path, context: &str) -> Model {
    qemu::convert_to_raw(image, raw);
    model.assert_equals_file(raw, &format!("{context}read by QEMU"));
    let mut bytes = content::bytes(raw);
    bytes.truncate(model.bytes().len());
    Model::holding(bytes)
}

/// The steps over NBD, with reads among them that are judged at once.
fn by_urus(
    image: &Path,
    driver: Driver,
    steps: &[Step],
    model: &mut Model,
    rng: &mut Rng,
) -> Result<(), String> {
    let cache = ["writeback", "none"][rng.index(2)];
    let served = Serve::new(image, driver).with("--cache").arg(cache).start();
    let text = |error: std::io::Error| error.to_string();
    let mut client = Client::connect(&served.socket()).map_err(text)?;
    for step in steps {
        let zero = |keep| Command::Zero { fua: false, keep };
        let (command, offset, length, byte) = match *step {
            Step::Write(offset, length, byte) => {
                let fua = byte % 16 == 1;
                (Command::Write { fua }, offset, length, byte)
            }
            Step::Zero(offset, length) => (zero(true), offset, length, 0),
            Step::ZeroUnmap(offset, length) => (zero(false), offset, length, 0),
            Step::Discard(offset, length) => (Command::Trim, offset, length, 0),
            Step::Flush => (Command::Flush, 0, 0, 0),
        };
        let payload = match command {
            Command::Write { .. } => vec![byte; usize::try_from(length).expect("small")],
            _ => Vec::new(),
        };
        client
            .ask(command, offset, length, &payload)
            .map_err(text)?;
        model.follow(std::slice::from_ref(step));
        if rng.chance(100) {
            let size = model.bytes().len() as u64;
            let offset = rng.below(size / 512) * 512;
            let length = (1 + rng.below(128 * KIB)).min(size - offset);
            let found = client
                .ask(Command::Read, offset, length, &[])
                .map_err(text)?;
            let wrong = model.wrong_sectors(offset, &found);
            if let Some(first) = wrong.first() {
                return Err(format!(
                    "{length} bytes read at {offset}: {} wrong sectors, the first {first}",
                    wrong.len()
                ));
            }
        }
    }
    drop(client);
    served.stop();
    Ok(())
}

/// Grows the image by either program, or shrinks it by QEMU, which alone can. The model is settled, and follows.
fn resize(
    image: &Path,
    raw: &Path,
    shape: Shape,
    ours: bool,
    model: &mut Model,
    rng: &mut Rng,
) -> Result<u64, String> {
    let size = model.bytes().len() as u64;
    let grown = size + (1 + rng.below(3000)) * 512;
    if ours {
        let text = |error: urus::Error| error.to_string();
        let device = urus::OpenOptions::new().open(image).map_err(text)?;
        device.resize(grown).map_err(text)?;
        device.close().map_err(text)?;
        model.resize(grown);
        return Ok(grown);
    }
    // Where zeroes cannot be recorded, QEMU does not grow an overlay that is shorter than its backing file.
    let never_shrunk = shape.version == 2 && shape.is_overlay();
    let (flag, new) = if shape.snapshot || never_shrunk || rng.chance(128) {
        ("", grown)
    } else {
        ("--shrink", size / 512 * 3 / 4 * 512)
    };
    qemu::img("resize -q -f qcow2")
        .words(flag)
        .arg(image)
        .arg(new.to_string())
        .ok();
    model.resize(new);
    // Of a cluster that shrinking cut in two QEMU keeps the second half, and growing shows it again. (urus shows
    // zeroes, which the model demands above.)
    let tail = size..size.next_multiple_of(shape.cluster).min(new);
    if !tail.is_empty() {
        qemu::convert_to_raw(image, raw);
        let at = |offset: u64| usize::try_from(offset).expect("small");
        let tail = at(tail.start)..at(tail.end);
        let mut bytes = model.bytes().to_vec();
        bytes[tail.clone()].copy_from_slice(&content::bytes(raw)[tail]);
        *model = Model::holding(bytes);
    }
    Ok(new)
}

/// All of it, through the library: no server stands between.
fn read_in_process(image: &Path) -> Result<Vec<u8>, String> {
    let text = |error: urus::Error| format!("reading by the library: {error}");
    let device = urus::OpenOptions::new()
        .read_only(true)
        .open(image)
        .map_err(text)?;
    let mut bytes = vec![0; usize::try_from(device.size()).expect("small")];
    let mut io = device.blocking().map_err(text)?;
    io.read_at(&mut bytes, 0).map_err(text)?;
    drop(io);
    device.close().map_err(text)?;
    Ok(bytes)
}

fn none_leaked(image: &Path) -> Result<(), String> {
    match leaks(image)? {
        0 => Ok(()),
        leaks => Err(format!("{leaks} leaked clusters")),
    }
}

fn equal_maps(image: &Path) -> Result<(), String> {
    let ours = urus().words("map --output=json -f qcow2").arg(image).ok();
    let (ours, theirs) = (pieces(&ours.json())?, pieces(&qemu::map(image))?);
    let pairs = || ours.iter().zip(&theirs);
    let at = pairs().take_while(|(ours, theirs)| ours == theirs).count();
    if at == ours.len() && at == theirs.len() {
        return Ok(());
    }
    Err(format!(
        "maps differ in entry {at}\nurus: {:?}\nQEMU: {:?}",
        ours.get(at),
        theirs.get(at)
    ))
}

/// Ranges that begin and end anywhere in a disk of this size, most of them short.
fn odd_ranges(size: u64, rng: &mut Rng) -> Vec<(u64, u64)> {
    let range = |_| {
        let offset = rng.below(size);
        let most = [700, 70 * KIB, size][rng.index(3)];
        (offset, (1 + rng.below(most)).min(size - offset))
    };
    (0..16).map(range).collect()
}

/// What the library says of ranges that begin and end anywhere, against what QEMU maps.
fn equal_statuses(image: &Path, rng: &mut Rng) -> Result<(), String> {
    let theirs = pieces(&qemu::map(image))?;
    let text = |error: urus::Error| format!("asking the library: {error}");
    let mut options = urus::OpenOptions::new();
    options.read_only(true);
    let device = options.open(image).map_err(text)?;
    let mut io = device.blocking().map_err(text)?;
    for (offset, length) in odd_ranges(device.size(), rng) {
        let end = offset + length;
        let mut ours = Vec::new();
        let mut at = offset;
        while at < end {
            let extents = io.block_status(at, end - at).map_err(text)?;
            at = extents.last().map_or(at, |last| last.start + last.len);
            ours.extend(extents.iter().map(Piece::of));
            if extents.is_empty() {
                return Err(format!("nothing is said of offset {at}"));
            }
        }
        let (ours, theirs) = (joined(ours), within(&theirs, offset, end));
        if ours != theirs {
            return Err(format!(
                "status of {length} bytes at {offset}\nurus: {ours:?}\nQEMU: {theirs:?}"
            ));
        }
    }
    drop(io);
    device.close().map_err(text)
}

/// The same over NBD, in both contexts.
fn equal_statuses_over_nbd(image: &Path, driver: Driver, rng: &mut Rng) -> Result<(), String> {
    let served = Serve::new(image, driver).with("--read-only").start();
    let theirs = pieces(&qemu::map(image))?;
    let size = theirs.last().map_or(0, |last| last.start + last.length);
    let ranges = odd_ranges(size, rng);
    let script = format!(
        "import json
both = nbd.NBD()
for name in ['base:allocation', 'qemu:allocation-depth']: both.add_meta_context(name)
both.connect_uri(h.get_uri())
said = []
for offset, length in {ranges:?}:
    def take(name, at, entries, error): said.append([name, at, offset + length, entries])
    both.block_status(length, offset, take)
print(json.dumps(said))
both.shutdown()"
    );
    let answers = served.nbdsh(&script).json();
    served.stop();
    let answers = answers.as_array().ok_or("no list")?;
    if answers.len() != 2 * ranges.len() {
        return Err(format!("{} answers", answers.len()));
    }
    for answer in answers {
        let is_depth = answer[0] == "qemu:allocation-depth";
        let number = |value: &serde_json::Value| value.as_u64().ok_or("not a number");
        let (start, end) = (number(&answer[1])?, number(&answer[2])?);
        let entries = answer[3].as_array().ok_or("no list of entries")?;
        let mut at = start;
        for entry in entries.chunks_exact(2) {
            let (length, flags) = (number(&entry[0])?, number(&entry[1])?);
            let stop = (at + length).min(end);
            for piece in within(&theirs, at, stop) {
                let [present, zero, data, _] = piece.flags;
                let expected = match (is_depth, present) {
                    (false, _) => u64::from(!data) | u64::from(zero) << 1,
                    (true, true) => piece.depth + 1,
                    // In no layer; or past the end of a backing file, to which QEMU counts it.
                    (true, false) if flags == 0 || flags == piece.depth + 2 => flags,
                    (true, false) => 0,
                };
                if flags != expected {
                    return Err(format!("{answer} at {at}: {flags}\nQEMU: {piece:?}"));
                }
            }
            at = stop;
        }
        if at != end {
            return Err(format!("{answer} ends at {at}"));
        }
    }
    Ok(())
}

/// The part of a map that lies in `[start, end)`.
fn within(pieces: &[Piece], start: u64, end: u64) -> Vec<Piece> {
    let cut = |piece: &Piece| {
        let from = piece.start.max(start);
        let to = (piece.start + piece.length).min(end);
        (from < to).then(|| Piece {
            start: from,
            length: to - from,
            offset: piece.offset.map(|offset| offset + (from - piece.start)),
            ..*piece
        })
    };
    pieces.iter().filter_map(cut).collect()
}

/// An entry of a map; the flags are present, zero, data, compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    length: u64,
    depth: u64,
    flags: [bool; 4],
    offset: Option<u64>,
}

impl Piece {
    fn of(extent: &urus::Extent) -> Self {
        Self {
            start: extent.start,
            length: extent.len,
            depth: extent.depth.into(),
            flags: [extent.present, extent.zero, extent.data, extent.compressed],
            offset: extent.host,
        }
    }
}

/// Neighbours of one kind, at adjacent places of one file, become one.
fn joined(all: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for next in all {
        match pieces.last_mut() {
            Some(last)
                if last.depth == next.depth
                    && last.flags == next.flags
                    && last.offset.map(|at| at + last.length) == next.offset =>
            {
                last.length += next.length;
            }
            _ => pieces.push(next),
        }
    }
    pieces
}

/// A map's entries, neighbours joined. QEMU looks for holes below data clusters where a file takes much less of the disk
/// than its refcounts say, and calls them data and zero at once; urus does not guess, so that is taken back here.
fn pieces(map: &serde_json::Value) -> Result<Vec<Piece>, String> {
    let mut pieces: Vec<Piece> = Vec::new();
    for entry in map.as_array().ok_or("a map is a list")? {
        let number = |name: &str| entry[name].as_u64();
        let flag = |name: &str| entry[name] == true;
        let data = flag("data");
        let next = Piece {
            start: number("start").ok_or("a map without a start")?,
            length: number("length").ok_or("a map without a length")?,
            depth: number("depth").ok_or("a map without a depth")?,
            flags: [
                flag("present"),
                flag("zero") && !data,
                data,
                flag("compressed"),
            ],
            offset: number("offset"),
        };
        pieces.push(next);
    }
    Ok(joined(pieces))
}

/// Many connections with many requests each; nobody is killed.
fn crowd(
    plan: &Plan,
    scratch: &Scratch,
    rng: &mut Rng,
    arguments: &Arguments,
    tally: &mut Tally,
) -> Result<(), String> {
    const REQUESTS: u64 = 8000;
    let (image, disk) = plan.build(scratch.path());
    let driver = arguments.driver(rng.below(2));
    let served = Serve::new(&image, driver).with(plan.serve).start();
    let (socket, stop) = (served.socket(), AtomicBool::new(false));
    let habits = Habits {
        connections: 8,
        depth: 16,
        cluster: plan.cluster,
        longest: (plan.cluster * 8).clamp(16 * KIB, 512 * KIB),
        // Much is freed, and flushed and taken again.
        weights: Weights {
            trim: 25,
            flush: 12,
            zero: 12,
            ..Weights::MIXED
        },
        may_fill_up: false,
        lies: false,
    };
    let seed = rng.next_u64();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(&disk, &socket, &habits, seed, &stop));
        while disk.answered() < REQUESTS && !load.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Release);
        load.join().map_err(|_| "the load panicked".to_owned())
    })?;
    let context = |text: String| format!("{driver:?}: {text}\n{}", served.log());
    disk.faultless().map_err(context)?;
    let bytes = read_all(&served)?;
    disk.judge_live(&bytes).map_err(context)?;
    served.stop();
    none_leaked(&image)?;
    equal_maps(&image)?;
    let raw = scratch.file("copy");
    qemu::convert_to_raw(&image, &raw);
    if content::bytes(&raw) != bytes {
        return Err(format!("{driver:?}: QEMU reads something else"));
    }
    tally.add("crowds", 1);
    tally.add("requests", disk.answered());
    Ok(())
}

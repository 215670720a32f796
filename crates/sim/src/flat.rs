//! Against a flat array: any bytes, any alignment, and no cuts. All cluster sizes and refcount widths.

use urus_engine::Control;
use urus_engine::limits::Sizes;
use urus_engine::request::RequestKind;
use urus_engine::storage::FileId;

use crate::config::{Backing, Config, TINY};
use crate::contents::index;
use crate::judge::Scene;
use crate::machine::Machine;
use crate::memory::SimMemory;
use crate::model::Model;
use crate::rng::{Rng, mix};
use crate::runner::{Outcome, guarded};
use crate::world::IMAGE;
use urus_format::{Compression, Header};

/// Cluster sizes times refcount widths.
pub const GEOMETRIES: u64 = 13 * 7;

/// The configuration of a run: every geometry in turn, the other features by lot.
#[must_use]
pub fn config(number: u64, rng: &mut Rng) -> Config {
    let geometry = number % GEOMETRIES;
    let cluster_bits = 9 + u32::try_from(geometry % 13).expect("small");
    let refcount_order = u32::try_from(geometry / 13).expect("small");
    let cluster_sectors = (1u64 << cluster_bits) / 512;
    let sectors = (cluster_sectors * 40).clamp(300, 8192) + rng.below(9);
    let mut config = Config {
        cluster_bits,
        refcount_order,
        sectors,
        fill: [0, 64, 200][rng.index(3)],
        queues: 1 + rng.index(3),
        depth: 1 + rng.index(12),
        discard: rng.chance(200),
        punch: rng.chance(200),
        ..Config::small("model")
    };
    if refcount_order == 4 && rng.chance(64) {
        config.version = 2;
    }
    if rng.chance(80) {
        let zstd = config.version == 3 && rng.chance(128);
        config.compressed = Some(if zstd {
            Compression::Zstd
        } else {
            Compression::Deflate
        });
    }
    config.snapshot = refcount_order > 0 && rng.chance(64);
    config.backing = match rng.index(6) {
        0 => Backing::Raw(40 + rng.below(80)),
        1 => Backing::Qcow2(40 + rng.below(80)),
        2 => Backing::Chain(40 + rng.below(80), 40 + rng.below(80)),
        _ => Backing::None,
    };
    config.cache_bytes = if rng.chance(96) { 0 } else { 1 << 20 };
    config.alignment = match rng.index(5) {
        0 => 512,
        1 if cluster_bits >= 12 => 4096,
        _ => 1,
    };
    config.device = rng.chance(24);
    if rng.chance(128) {
        // Whatever a slice is, in whatever cluster.
        let slice = |rng: &mut Rng| 1 << (6 + rng.below(7));
        let unit = u64::from(config.alignment);
        config.sizes = Sizes {
            slice_bytes: slice(rng),
            refcount_slice_bytes: slice(rng),
            zero_buffer_bytes: unit.max(512) << rng.below(4),
            ..TINY
        };
        config.refcount_slices = Some(1 + rng.index(6));
        config.cache_bytes = 16 << 10;
    }
    if rng.chance(24) {
        (config.raw, config.device, config.backing) = (true, false, Backing::None);
    }
    if config.raw || matches!(config.backing, Backing::Raw(_)) {
        config.odd = [0, 24 + rng.index(512 - 24)][rng.index(2)];
    }
    config
}

/// A request in flight, and what is to come of it.
struct Flight {
    token: u64,
    start: usize,
    end: usize,
    what: What,
}

#[derive(Clone, PartialEq, Eq)]
enum What {
    /// Must return this.
    Read(Vec<u8>),
    Change,
    /// Each byte may be what it was, or zero.
    Discard,
    /// The read after a discard: the bytes before it.
    AfterDiscard(Vec<u8>),
    Flush,
}

struct Flat {
    bytes: Vec<u8>,
    flights: Vec<Flight>,
    rng: Rng,
    requests: u64,
}

/// Runs one workload; the operations are counted in `ops`.
#[must_use]
pub fn run(seed: u64, number: u64, requests: u64) -> Outcome {
    guarded(|outcome| {
        let mut rng = Rng::new(mix(seed ^ mix(number)));
        let config = config(number, &mut rng);
        attempt(&config, &mut rng, requests, outcome)
            .map_err(|error| format!("{error} ({config:?})"))
    })
}

fn attempt(
    config: &Config,
    rng: &mut Rng,
    requests: u64,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let scene = Scene::new(config, &mut rng.fork(1));
    let mut files = scene.files().to_vec();
    let mut flat = Flat {
        bytes: if config.raw {
            files[0].bytes().to_vec()
        } else {
            crate::image::bytes_of(&scene.fixture.initial)
        },
        flights: Vec::new(),
        rng: rng.fork(2),
        requests: 0,
    };
    let mut swaps = Rng::new(mix(rng.clone().next_u64()));
    for life in 0..3 {
        let driving = scene.driving(rng);
        let model = Model::zeroed(0);
        let mut machine = scene.machine(&files, &[], &model, driving, Vec::new(), rng)?;
        flat.life(&mut machine, requests / 3)?;
        if life < 2 && !config.device && rng.chance(96) {
            flat.grow(&mut machine, config)?;
            flat.life(&mut machine, requests / 9)?;
        }
        if !config.raw && !config.device && !config.snapshot && swaps.chance(96) {
            flat.swap(&mut machine, &scene, u64::from(life) + 1, &mut swaps)?;
            flat.life(&mut machine, requests / 9)?;
        }
        machine.close()?;
        let world = &machine.world;
        if let Some(complaint) = world.complaints().first() {
            return Err(format!("the storage complains: {complaint}"));
        }
        outcome.trace ^= world.trace_hash().rotate_left(life);
        files = (0..)
            .zip(&files)
            .map(|(n, _)| world.contents(FileId(n)).clone())
            .collect();
        let (guest, leaks) = scene.guest(&files, flat.bytes.len())?;
        if let Some(at) = guest.iter().zip(&flat.bytes).position(|(a, b)| a != b) {
            return Err(format!(
                "life {life}: after closing, byte {at:#x} is {:#x}, not {:#x}",
                guest[at], flat.bytes[at]
            ));
        }
        if leaks > 0 {
            return Err(format!(
                "life {life}: after closing, {leaks} clusters have leaked"
            ));
        }
    }
    outcome.ops = flat.requests;
    Ok(())
}

impl Flat {
    fn is_free(&self, start: usize, end: usize, write: bool) -> bool {
        let meets = |flight: &Flight| {
            let reads = matches!(flight.what, What::Read(_));
            flight.start < end && start < flight.end && (write || !reads)
        };
        !self.flights.iter().any(meets)
    }

    fn range(&mut self) -> (usize, usize) {
        let len = self.bytes.len();
        let start = self.rng.index(len);
        let most = match self.rng.index(5) {
            0 => 64,
            1 => 4096,
            2 => 40_000,
            3 => 400_000,
            _ => 1 << 21,
        };
        let count = (1 + self.rng.index(most)).min(len - start);
        if self.rng.chance(64) {
            let start = start & !4095;
            return (start, (start + (count | 4095) + 1).min(len));
        }
        (start, start + count)
    }

    fn life(&mut self, machine: &mut Machine, requests: u64) -> Result<(), String> {
        for _ in 0..requests {
            self.one(machine)?;
            for _ in 0..self.rng.below(12) {
                machine.step()?;
            }
            self.replies(machine)?;
        }
        while !self.flights.is_empty() {
            machine.drain()?;
            self.replies(machine)?;
        }
        Ok(())
    }

    /// Submits one request, where it does not meet another.
    fn one(&mut self, machine: &mut Machine) -> Result<(), String> {
        let (start, end) = self.range();
        let (offset, len) = (start as u64, (end - start) as u64);
        let drawn = self.rng.index(16);
        if !self.is_free(start, end, drawn >= 5) {
            return Ok(());
        }
        let fua = self.rng.chance(8);
        let (what, kind) = match drawn {
            0..5 => {
                let memory = machine.guest_memory(vec![0xa5; end - start]);
                let expected = self.bytes[start..end].to_vec();
                (What::Read(expected), RequestKind::Read { offset, memory })
            }
            5..10 => {
                let data = self.data(end - start);
                let memory = machine.guest_memory(data);
                (
                    What::Change,
                    RequestKind::Write {
                        offset,
                        memory,
                        fua,
                    },
                )
            }
            10 | 11 => {
                let unmap = self.rng.chance(128);
                (
                    What::Change,
                    RequestKind::WriteZeroes {
                        offset,
                        len,
                        unmap,
                        fua,
                    },
                )
            }
            12 | 13 => (What::Discard, RequestKind::Discard { offset, len }),
            _ => (What::Flush, RequestKind::Flush),
        };
        let written = match &kind {
            RequestKind::Write { memory, .. } => Some(memory.to_vec()),
            RequestKind::WriteZeroes { .. } => Some(vec![0; end - start]),
            _ => None,
        };
        let Some(token) = machine.submit_kind(kind) else {
            return Ok(());
        };
        self.requests += 1;
        if let Some(bytes) = written {
            self.bytes[start..end].copy_from_slice(&bytes);
        }
        let (start, end) = if what == What::Flush {
            (0, 0)
        } else {
            (start, end)
        };
        self.flights.push(Flight {
            token,
            start,
            end,
            what,
        });
        Ok(())
    }

    /// Bytes that tell places apart, sometimes with a run of zeroes, sometimes nothing else.
    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(len + 8);
        while data.len() < len {
            data.extend_from_slice(&self.rng.next_u64().to_le_bytes());
        }
        data.truncate(len);
        if self.rng.chance(48) {
            let from = self.rng.index(len);
            data[from..].fill(0);
        }
        data
    }

    fn replies(&mut self, machine: &mut Machine) -> Result<(), String> {
        for (token, result, memory) in std::mem::take(&mut machine.replies) {
            let at = self.flights.iter().position(|flight| flight.token == token);
            let flight = self.flights.swap_remove(at.ok_or("a reply to nothing")?);
            result.map_err(|error| format!("a request failed: {error}"))?;
            let (start, end) = (flight.start, flight.end);
            match flight.what {
                What::Change | What::Flush => {}
                What::Read(expected) => {
                    let found = memory
                        .map(|memory: SimMemory| memory.to_vec())
                        .unwrap_or_default();
                    same(start, &found, &expected)?;
                }
                What::Discard => {
                    let before = self.bytes[start..end].to_vec();
                    let memory = machine.guest_memory(vec![0xa5; end - start]);
                    let offset = start as u64;
                    let kind = RequestKind::Read { offset, memory };
                    let token = loop {
                        match machine.submit_kind(kind_again(&kind)) {
                            Some(token) => break token,
                            None => machine.make_room()?,
                        }
                    };
                    let what = What::AfterDiscard(before);
                    self.flights.push(Flight {
                        token,
                        start,
                        end,
                        what,
                    });
                }
                What::AfterDiscard(before) => {
                    let found = memory
                        .map(|memory: SimMemory| memory.to_vec())
                        .unwrap_or_default();
                    let legal = |(found, old): (&u8, &u8)| *found == *old || *found == 0;
                    if found.len() != before.len() || !found.iter().zip(&before).all(legal) {
                        return Err(format!(
                            "[{start:#x}, {end:#x}) holds something else after a discard"
                        ));
                    }
                    self.bytes[start..end].copy_from_slice(&found);
                }
            }
        }
        Ok(())
    }

    /// Another process puts another image in the place of this one during a pause. Nothing is in flight.
    fn swap(
        &mut self,
        machine: &mut Machine,
        scene: &Scene,
        number: u64,
        rng: &mut Rng,
    ) -> Result<(), String> {
        machine.control(Control::Pause)?;
        let sectors = self.bytes.len() as u64 / 512 + rng.below(2) * rng.below(300);
        let built = scene.another(sectors, number, rng);
        self.bytes = crate::image::bytes_of(&built.active);
        let header = Header::parse(&built.bytes, built.bytes.len() as u64);
        let header = header.map_err(|error| error.to_string())?;
        machine.world.replace(IMAGE, built.bytes);
        let resumed = machine.resume(Some(header))?;
        resumed.then_some(()).ok_or_else(|| "not resumed".into())
    }

    fn grow(&mut self, machine: &mut Machine, config: &Config) -> Result<(), String> {
        let old = self.bytes.len() as u64;
        let size = old + 512 * (1 + self.rng.below(config.cluster_sectors() * 70).min(4096));
        match machine.control(|reply| Control::Resize(size, reply)) {
            Err(error) if error.contains("version 2") || error.contains("cannot grow") => {
                return Ok(());
            }
            Err(error) => return Err(format!("growing to {size}: {error}")),
            Ok(()) => {}
        }
        self.bytes.resize(index(size), 0);
        Ok(())
    }
}

fn kind_again(kind: &RequestKind<SimMemory>) -> RequestKind<SimMemory> {
    match kind {
        RequestKind::Read { offset, memory } => RequestKind::Read {
            offset: *offset,
            memory: memory.clone(),
        },
        _ => unreachable!("only reads are tried again"),
    }
}

fn same(start: usize, found: &[u8], expected: &[u8]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err("a read of another length".to_owned());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!(
            "read: byte {:#x} is {:#x}, not {:#x} (of [{start:#x}, +{:#x}))",
            start + at,
            found[at],
            expected[at],
            found.len()
        )),
    }
}

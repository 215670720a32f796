//! Judges the files that a power cut has left, with and without the engine.

use std::collections::HashSet;
use std::ops::ControlFlow;

use urus_engine::check::Repair;
use urus_engine::storage::FileId;
use urus_engine::{LayerSpec, Maintenance, Options, check_image};
use urus_format::Header;

use crate::checker::{self, GuestReader, Report, Violation};
use crate::config::{Config, Fixture, ODD, layers};
use crate::contents::{Change, Contents, index};
use crate::crash::{Class, CrashCursor, Limits, State};
use crate::fault::Fault;
use crate::image::Built;
use crate::machine::{Driving, Machine};
use crate::model::{Model, View};
use crate::rng::Rng;
use crate::workload::Workload;
use crate::world::{FileSpec, IMAGE, SimConfig, SimWorld};

/// What stays the same over a whole run.
#[derive(Clone, Debug)]
pub struct Scene {
    /// The configuration.
    pub config: Config,
    /// The files before the first request.
    pub fixture: Fixture,
    files: Vec<Contents>,
}

/// What was found in sound files.
#[derive(Clone, Debug)]
pub struct Found {
    /// Clusters leaked.
    pub leaks: u64,
    /// Entries without COPIED at refcount 1.
    pub copied_clear: u64,
    /// What the guest reads.
    pub guest: Vec<u8>,
    /// The image is marked as not closed.
    pub dirty: bool,
}

impl Scene {
    /// Makes the files of a configuration.
    #[must_use]
    pub fn new(config: &Config, rng: &mut Rng) -> Self {
        let config = config.settled(rng);
        let fixture = config.fixture(rng);
        let files = fixture.files.iter().cloned().map(FileSpec::into_contents);
        Self {
            config,
            files: files.collect(),
            fixture,
        }
    }

    /// The files before the first request.
    #[must_use]
    pub fn files(&self) -> &[Contents] {
        &self.files
    }

    /// Judges files without the engine: is the structure sound, may each sector hold what it holds, is the
    /// snapshot what it was?
    ///
    /// # Errors
    /// What is wrong.
    pub fn judge(&self, files: &[Contents], view: &View) -> Result<Found, String> {
        self.judge_marked(files, view, false)
    }

    /// As [`judge`](Self::judge), in the middle of a repair: the image may be marked dirty.
    fn judge_repairing(&self, files: &[Contents], view: &View) -> Result<Found, String> {
        self.judge_marked(files, view, true)
    }

    fn judge_marked(&self, files: &[Contents], view: &View, marked: bool) -> Result<Found, String> {
        let sizes: Vec<u64> = view.sizes().iter().map(|sectors| sectors * 512).collect();
        let snapshot = view.snapshot().or(self.fixture.snapshot.as_deref());
        let (guest, mut report) = self.read(files, &sizes, snapshot)?;
        if self.config.raw && self.config.odd > 0 {
            // What lies behind the last whole sector is nobody's to change.
            let behind = &files[0].bytes()[index(sizes[0])..];
            if behind != vec![ODD; self.config.odd] {
                return Err("what lies behind the last whole sector has changed".to_owned());
            }
        }
        if self.is_miscounted(&report) {
            // Whoever opens it for writing counts anew.
            report.leak_count = 0;
        }
        let may_be_dirty = marked || self.config.left_open;
        if !marked && report.corrupt || !may_be_dirty && report.dirty {
            return Err("the image is marked dirty or corrupt".to_owned());
        }
        view.check(0, &guest)
            .map_err(|mismatch| mismatch.to_string())?;
        Ok(Found {
            leaks: report.leak_count,
            copied_clear: report.copied_clear,
            guest,
            dirty: report.dirty,
        })
    }

    /// While such an image is marked as not closed its refcounts mean nothing.
    fn is_miscounted(&self, report: &Report) -> bool {
        self.config.miscounted && report.dirty
    }

    /// What the guest reads, and how many clusters have leaked; for any size of the disk.
    ///
    /// # Errors
    /// What is wrong.
    pub fn guest(&self, files: &[Contents], size: usize) -> Result<(Vec<u8>, u64), String> {
        let snapshot = self.fixture.snapshot.as_deref();
        let (guest, report) = self.read(files, &[size as u64], snapshot)?;
        Ok((guest, report.leak_count))
    }

    /// `sizes`: those that the disk may have, in bytes.
    fn read(
        &self,
        files: &[Contents],
        sizes: &[u64],
        snapshot: Option<&[u8]>,
    ) -> Result<(Vec<u8>, Report), String> {
        let checked = |size: u64| match sizes.contains(&size) {
            true => Ok(index(size)),
            false => Err(format!("the disk has {size} bytes, and may have {sizes:?}")),
        };
        if self.config.raw {
            let mut guest = files[0].bytes().to_vec();
            if self.config.grows == 0 {
                guest.resize(index(sizes[0]), 0);
            } else {
                checked(guest.len() as u64)?;
            }
            return Ok((guest, Report::default()));
        }
        let report = checker::check(files[0].bytes());
        let miscounted = self.is_miscounted(&report);
        let is_about_counts = |violation: &&Violation| {
            let counts = matches!(
                violation,
                Violation::RefcountTooLow { .. } | Violation::Copied { .. }
            );
            miscounted && counts
        };
        let mut violations = report.violations.iter();
        if let Some(violation) = violations.find(|violation| !is_about_counts(violation)) {
            return Err(violation.to_string());
        }
        // O28: whoever has made the image, its header is what it was but for what had to change.
        // (Another process may have put another header there.)
        if !self.config.swaps {
            checker::header_kept(self.files[0].bytes(), files[0].bytes())
                .map_err(|violation| violation.to_string())?;
        }
        let behind = |offset: u64, len: usize| {
            let bytes = self.fixture.behind.as_deref().unwrap_or_default();
            let start = index(offset).min(bytes.len());
            bytes[start..(start + len).min(bytes.len())].to_vec()
        };
        let reader = GuestReader::open(files[0].bytes(), Some(&behind))
            .map_err(|error| error.to_string())?
            .ciphered(self.config.ciphered);
        let size = checked(reader.size())?;
        let guest = reader.read(0, size).map_err(|error| error.to_string())?;
        if let Some(snapshot) = snapshot {
            let found = reader
                .snapshot(0)
                .and_then(|reader| reader.read(0, snapshot.len()))
                .map_err(|error| error.to_string())?;
            if found != *snapshot {
                let at = found.iter().zip(snapshot).position(|(a, b)| a != b);
                let at = at.unwrap_or(found.len());
                return Err(format!("the snapshot has changed in sector {}", at / 512));
            }
        }
        Ok((guest, report))
    }

    /// A refcount table that has room for all blocks stays where it is: moving it costs a barrier and clusters.
    ///
    /// # Errors
    /// Where it has moved.
    pub fn table_stays(&self, before: &[u8], after: &[u8]) -> Result<(), String> {
        let parse = |bytes: &[u8]| {
            Header::parse(bytes, bytes.len() as u64).map_err(|error| error.to_string())
        };
        let (old, new) = (parse(before)?, parse(after)?);
        let geometry = old.geometry();
        let last = geometry.clusters_for(after.len() as u64) >> geometry.refcount_block_bits();
        let room = (u64::from(old.refcount_table_clusters) << geometry.cluster_bits()) / 8;
        if last < room && old.refcount_table != new.refcount_table {
            return Err(format!(
                "the refcount table has moved, with room for {room} blocks, of which {last} is the last"
            ));
        }
        Ok(())
    }

    /// A machine with these files.
    #[must_use]
    pub fn world(&self, files: &[Contents], behaviour: SimConfig, seed: u64) -> SimWorld {
        let specs = files
            .iter()
            .zip(&self.fixture.files)
            .map(|(contents, old)| (contents.clone(), old.properties, old.writable, old.capacity));
        SimWorld::holding(seed, behaviour, specs)
    }

    /// The files of a machine that has these.
    #[must_use]
    pub fn files_in(&self, world: &SimWorld) -> Vec<Contents> {
        (0..)
            .zip(&self.files)
            .map(|(number, _)| world.contents(FileId(number)).clone())
            .collect()
    }

    /// The engine opens these files read-only while something goes wrong: it says so, if that mattered, and changes nothing.
    ///
    /// # Errors
    /// What is wrong.
    pub fn look(&self, files: &[Contents], faults: Vec<Fault>) -> Result<(), String> {
        let world = self.world(files, SimConfig::default(), 1);
        world.forbid_writes();
        world.plan_faults(faults);
        let mut options = self.config.options();
        options.read_only = true;
        let opened = Maintenance::open(world.handle(), layers(files, &self.fixture.raw)?, options);
        let told = |what: String| Err(format!("opened read-only: {what}"));
        match opened {
            Err(error) if world.injected() == 0 => return told(error.to_string()),
            Err(_) | Ok(_) => {}
        }
        world.complaints().into_iter().next().map_or(Ok(()), told)
    }

    /// The engine opens these files, read-only or for writing, and closes them.
    ///
    /// # Errors
    /// What the engine says.
    pub fn open_and_close(&self, files: &[Contents], read_only: bool) -> Result<(), String> {
        let world = self.world(files, SimConfig::default(), 1);
        let mut options: Options = self.config.options();
        options.read_only = read_only;
        let layers = layers(files, &self.fixture.raw)?;
        let opened = Maintenance::open(world.handle(), layers, options);
        drop(opened.map_err(|error| format!("it does not open: {error}"))?);
        Ok(())
    }

    /// The engine checks these files and repairs leaks, or everything; afterwards nothing is leaked, and the guest
    /// reads what it read before. Then the power fails in the middle of the repair.
    ///
    /// # Errors
    /// What is wrong.
    pub fn repair(
        &self,
        files: &[Contents],
        found: &Found,
        view: &View,
        rng: &mut Rng,
    ) -> Result<u64, String> {
        if self.config.raw {
            return Ok(0);
        }
        let world = self.world(files, self.config.machine(rng), rng.next_u64());
        let header = || {
            let parsed = Header::parse(files[0].bytes(), files[0].len());
            parsed.map_err(|error| error.to_string())
        };
        let run = |world: &SimWorld, repair| {
            check_image(world.handle(), IMAGE, "image".to_owned(), header()?, repair)
                .map_err(|error| format!("check: {error}"))
        };
        let before = run(&world, Repair::None)?;
        let miscounted = self.config.miscounted && found.dirty;
        let leaks = before.leaks + before.leaks_past_end;
        let corrupt = before.corruptions != before.copied_clear_at_one && !miscounted;
        if corrupt || before.check_errors > 0 {
            return Err(format!(
                "check finds corruption in a sound image: {:?}",
                before.messages
            ));
        }
        if leaks != found.leaks && !miscounted {
            return Err(format!(
                "check counts {leaks} leaks, there are {}",
                found.leaks
            ));
        }
        // Leaks alone are not freed while other refcounts are too low.
        let least = usize::from(miscounted);
        let repair = [Repair::Leaks, Repair::All][least.max(rng.index(2))];
        let after = run(&world, repair)?;
        if after.leaks + after.leaks_past_end > 0 {
            return Err(format!(
                "after a repair of leaks check counts {}",
                after.leaks
            ));
        }
        world.settle();
        let repaired: Vec<Contents> = (0..)
            .zip(files)
            .map(|(number, _)| world.contents(FileId(number)).clone())
            .collect();
        let now = self
            .judge(&repaired, view)
            .map_err(|error| format!("after a repair: {error}"))?;
        if now.leaks > 0 || now.guest != found.guest {
            return Err(format!(
                "after a repair: {} leaks, or other content",
                now.leaks
            ));
        }
        let log = world.log();
        let mut cursor = CrashCursor::new(&log);
        let (mut known, mut states, mut violation) = (HashSet::new(), 0, None);
        let limits = Limits {
            exhaustive: 3,
            random: 2,
            torn: 2,
            each: 1,
        };
        while cursor.advance(&log) {
            let mut visit = |state: &State<'_>| {
                states += 1;
                let judged = self.judge_repairing(state.files, view);
                match judged {
                    Ok(now) if now.guest == found.guest => ControlFlow::Continue(()),
                    other => {
                        let error = other.err().unwrap_or_else(|| "other content".to_owned());
                        violation =
                            Some(format!("cut in a repair, {}: {error}", state.choice.name));
                        ControlFlow::Break(())
                    }
                }
            };
            let classify = |_: FileId, _: &Change| Class::Unknown;
            cursor.enumerate(rng, &limits, &classify, (&mut known, 0), &mut visit);
        }
        violation.map_or(Ok(states), Err)
    }

    /// Opens these files for writing, with a model of what they hold.
    ///
    /// # Errors
    /// What the engine says.
    pub fn machine(
        &self,
        files: &[Contents],
        guest: &[u8],
        model: &Model,
        driving: Driving,
        faults: Vec<Fault>,
        rng: &mut Rng,
    ) -> Result<Machine, String> {
        let behaviour = self.config.machine(rng);
        let world = self.world(files, behaviour, rng.next_u64());
        world.plan_faults(faults);
        self.machine_in(&world, files, guest, model, driving, rng)
    }

    /// The chain that these files make.
    ///
    /// # Errors
    /// What is wrong with a header.
    pub fn layers(&self, files: &[Contents]) -> Result<Vec<LayerSpec>, String> {
        layers(files, &self.fixture.raw)
    }

    /// As [`machine`](Self::machine), in a world that holds these files.
    ///
    /// # Errors
    /// What the engine says.
    pub fn machine_in(
        &self,
        world: &SimWorld,
        files: &[Contents],
        guest: &[u8],
        model: &Model,
        driving: Driving,
        rng: &mut Rng,
    ) -> Result<Machine, String> {
        let model = model
            .adopt(guest)
            .map_err(|mismatch| mismatch.to_string())?;
        let layers = layers(files, &self.fixture.raw)?;
        Machine::open(
            world,
            layers,
            self.config.options(),
            model,
            driving,
            rng.fork(11),
        )
    }

    /// Another image of this geometry over the same files, as another process may have written it meanwhile, for a disk of so many
    /// sectors; `number`: the how manyth.
    #[must_use]
    pub fn another(&self, sectors: u64, number: u64, rng: &mut Rng) -> Built {
        let behind = self.fixture.behind_contents.as_deref();
        self.config.image(behind, sectors, number, rng)
    }

    /// A workload for this configuration.
    #[must_use]
    pub fn workload(&self, rng: &mut Rng) -> Workload {
        let (sectors, cluster) = (self.config.sectors, self.config.cluster_sectors());
        let workload = Workload::new(rng.fork(12), sectors, cluster);
        workload.of_kind(self.config.load)
    }

    /// How a machine is driven, by lot.
    #[must_use]
    pub fn driving(&self, rng: &mut Rng) -> Driving {
        Driving {
            queues: self.config.queues,
            depth: 1 + rng.index(self.config.depth),
            spurious: rng.chance(64),
            errors: false,
            outlives: self.config.outlives,
        }
    }
}

//! One workload: run it, look at the image, then cut the power again and again. From some of the states it goes on
//! writing, and cuts once more.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use urus_engine::seen::{self, Ways};
use urus_engine::storage::FileId;
use urus_format::Header;

use crate::callers::Asked;
use crate::census::{Census, Kind};
use crate::checker;
use crate::config::{Config, FIRST_VERSION};
use crate::contents::{Change, Contents};
use crate::crash::{Class, CrashCursor, Limits};
use crate::errors::Injection;
use crate::judge::Scene;
use crate::machine::{Driving, Machine};
use crate::model::Model;
use crate::qemu;
use crate::rng::Rng;
use crate::workload::{Ask, Workload};
use crate::world::{IMAGE, SimWorld};

/// What one workload gave.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Workloads, where there was more than one.
    pub workloads: u64,
    /// Cut points.
    pub cuts: u64,
    /// States judged.
    pub states: u64,
    /// States from which it went on writing.
    pub reopened: u64,
    /// Clusters leaked in the worst state.
    pub largest_leak: u64,
    /// States judged by QEMU too.
    pub qemu: u64,
    /// Errors that really hit.
    pub injected: u64,
    /// What they hit, and what they did not.
    pub census: Census,
    /// Storage operations and fdatasyncs of the first life.
    pub ops: u64,
    /// See there.
    pub syncs: u64,
    /// What each operation of the first life is, where errors were planned.
    pub(crate) kinds: Vec<Kind>,
    /// Who asked for them, likewise.
    pub(crate) asked: Asked,
    /// Ways through the engine that only large images take, and this has taken.
    pub ways: Ways,
    /// Names the run.
    pub trace: u64,
    /// What is wrong, and where.
    pub violation: Option<String>,
}

/// States of a killed process at each cut point.
const KILLS: u32 = 3;

/// How much of each.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Requests of the workload.
    pub requests: u64,
    /// Cut points, at most.
    pub cuts: u64,
    /// States at each.
    pub limits: Limits,
    /// One in so many states is reopened for writing.
    pub reopen: u64,
    /// How often the power may fail.
    pub depth: u32,
    /// One in so many states is also judged by QEMU; 0: none.
    pub qemu: u64,
    /// Once or twice in a life the device is paused, and reads its metadata again.
    pub pauses: bool,
}

impl Effort {
    /// For many workloads.
    pub const QUICK: Self = Self {
        requests: 160,
        cuts: 24,
        limits: Limits {
            exhaustive: 5,
            random: 20,
            torn: 6,
            each: 5,
        },
        reopen: 40,
        depth: 2,
        qemu: 0,
        pauses: false,
    };

    /// For some of them: up to ten pending changes in every subset.
    pub const THOROUGH: Self = Self {
        limits: Limits {
            exhaustive: 10,
            random: 64,
            torn: 24,
            each: 16,
        },
        // Each life after a cut is looked at as thoroughly.
        reopen: 2000,
        ..Self::QUICK
    };

    /// Of the workload of this seed: one in four is looked at thoroughly.
    #[must_use]
    pub fn of_cuts(seed: u64) -> Self {
        if seed.is_multiple_of(4) {
            Self::THOROUGH
        } else {
            Self::QUICK
        }
    }

    /// For very many workloads, each with an error.
    pub const ERRORS: Self = Self {
        requests: 50,
        cuts: 2,
        limits: Limits {
            exhaustive: 2,
            random: 4,
            torn: 2,
            each: 1,
        },
        reopen: 20,
        depth: 1,
        qemu: 0,
        pauses: true,
    };
}

/// Runs one workload; a panic counts as a violation.
#[must_use]
pub fn run(config: &Config, seed: u64, effort: &Effort) -> Outcome {
    run_with(config, seed, effort, None)
}

/// Runs one workload, with errors injected into its first life.
#[must_use]
pub fn run_with(
    config: &Config,
    seed: u64,
    effort: &Effort,
    injection: Option<Injection>,
) -> Outcome {
    let mut outcome = guarded(|outcome| attempt(config, seed, effort, injection, outcome));
    if let (Some(injection), Some(violation)) = (injection, &outcome.violation) {
        outcome.violation = Some(format!("{injection:?}: {violation}"));
    }
    outcome
}

/// Runs something that fills an outcome; an error or a panic is its violation.
pub fn guarded(f: impl FnOnce(&mut Outcome) -> Result<(), String>) -> Outcome {
    let mut outcome = Outcome::default();
    let _ = seen::take();
    let result = catch_unwind(AssertUnwindSafe(|| f(&mut outcome)));
    outcome.ways = seen::take();
    outcome.violation = match result {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(panic) => {
            let place = PANIC_PLACE.with_borrow_mut(std::mem::take);
            Some(format!("panic: {}{place}", panic_text(&*panic)))
        }
    };
    outcome
}

thread_local! {
    static PANIC_PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics are told with the violation, and not printed.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|place| format!(" ({place})"));
        PANIC_PLACE.set(place.unwrap_or_default());
    }));
}

/// What a panic said.
#[must_use]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic of unknown kind")
}

fn attempt(
    config: &Config,
    seed: u64,
    effort: &Effort,
    injection: Option<Injection>,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let scene = Scene::new(config, &mut rng.fork(1));
    let files = scene.files();
    let model = Model::new(scene.fixture.initial.clone(), FIRST_VERSION)
        .with_room(scene.config.sectors + scene.config.grows);
    let initial = scene
        .judge(files, &model.after_cut(0))
        .map_err(|error| format!("before the first request: {error}"))?;
    if initial.leaks > 0 {
        return Err(format!("before the first request: {} leaks", initial.leaks));
    }
    let mut driving = scene.driving(&mut rng);
    driving.errors = injection.is_some();
    let faults = injection.map(Injection::fault).into_iter().collect();
    let world = scene.world(files, config.machine(&mut rng), rng.next_u64());
    world.plan_faults(faults);
    let opened = scene.machine_in(&world, files, &initial.guest, &model, driving, &mut rng);
    let machine = match opened {
        // The error came while it was opened, and was told.
        Err(_) if world.injected() > 0 => {
            outcome.census.add(world.census());
            outcome.injected += world.injected();
            return open_after_all(&scene, &world, &model, driving, &mut rng);
        }
        opened => opened?,
    };
    if let Some(injection) = injection {
        scene.look(files, vec![injection.fault()])?;
    }
    let workload = scene.workload(&mut rng);
    let run = Run {
        scene: &scene,
        effort,
        leaks: 0,
        depth: 1,
        injection,
    };
    run.whole(machine, workload, effort.requests, &mut rng, outcome)
}

/// An error that came while the device was opened has harmed nothing: without it the same files open, and hold what they did.
fn open_after_all(
    scene: &Scene,
    world: &SimWorld,
    model: &Model,
    driving: Driving,
    rng: &mut Rng,
) -> Result<(), String> {
    world.plan_faults(Vec::new());
    world.settle();
    let after = |error| format!("after an error in opening: {error}");
    let judge = || {
        let files = scene.files_in(world);
        let found = scene.judge(&files, &model.after_cut(world.now()));
        found.map(|found| (files, found))
    };
    let (files, found) = judge().map_err(after)?;
    let mut machine = scene
        .machine_in(world, &files, &found.guest, model, driving, rng)
        .map_err(after)?;
    machine.expect_errors(false);
    machine.read_all().map_err(after)?;
    machine.close().map_err(after)?;
    let (_, found) = judge().map_err(after)?;
    if let Some(complaint) = world.complaints().first() {
        return Err(after(format!("the storage complains: {complaint}")));
    }
    if found.leaks > 0 || found.dirty {
        return Err(after(format!(
            "closed with {} leaks, marked dirty: {}",
            found.leaks, found.dirty
        )));
    }
    Ok(())
}

/// Runs a list of requests, one after another or all at once, and cuts at every point.
#[must_use]
pub fn run_list(config: &Config, seed: u64, effort: &Effort, asks: &[Ask]) -> Outcome {
    guarded(|outcome| {
        let mut rng = Rng::new(seed);
        let scene = Scene::new(config, &mut rng.fork(1));
        let files = scene.files();
        let model = Model::new(scene.fixture.initial.clone(), FIRST_VERSION);
        let guest = scene.judge(files, &model.after_cut(0))?.guest;
        let driving = scene.driving(&mut rng);
        let mut machine = scene.machine(files, &guest, &model, driving, Vec::new(), &mut rng)?;
        let at_once = rng.chance(128);
        for ask in asks {
            machine.ask(*ask)?;
            if !at_once {
                machine.drain()?;
            }
        }
        let run = Run {
            scene: &scene,
            effort,
            leaks: 0,
            depth: 1,
            injection: None,
        };
        run.end(machine, &mut rng, outcome)
    })
}

/// One life of a device, from opening to closing.
struct Run<'a> {
    scene: &'a Scene,
    effort: &'a Effort,
    /// Leaked before it was opened.
    leaks: u64,
    /// The first life, or one after a cut.
    depth: u32,
    injection: Option<Injection>,
}

impl Run<'_> {
    fn whole(
        &self,
        mut machine: Machine,
        mut workload: Workload,
        requests: u64,
        rng: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let patience = [1, 8, 40][rng.index(3)];
        workload.grow_to(machine.model.sectors());
        for _ in 0..requests {
            // Once or twice in a life.
            if self.scene.config.grows > 0 && rng.below(requests) < 2 {
                self.grow(&mut machine, &mut workload, rng)?;
            }
            let pauses = self.effort.pauses || self.scene.config.swaps;
            let often = if self.scene.config.swaps { 4 } else { 2 };
            if pauses && rng.below(requests) < often {
                self.pause(&mut machine, &mut workload, rng)?;
            }
            // (An error that kept the next one from opening would be nobody's fault.)
            let dies = self.scene.config.dies && self.injection.is_none();
            if dies && rng.below(requests) < 3 {
                self.succession(&mut machine, rng)?;
                workload.grow_to(machine.model.sectors());
            }
            machine.ask(workload.next_ask())?;
            for _ in 0..rng.below(patience) {
                machine.step()?;
            }
        }
        machine.drain()?;
        machine.survey()?;
        if self.injection.is_some() {
            self.recover(&mut machine, &mut workload)?;
        }
        self.end(machine, rng, outcome)
    }

    fn grow(
        &self,
        machine: &mut Machine,
        workload: &mut Workload,
        rng: &mut Rng,
    ) -> Result<(), String> {
        let sectors = machine.model.sectors();
        let room = (self.scene.config.sectors + self.scene.config.grows) - sectors;
        if room > 0 && machine.grow(sectors + 1 + rng.below(room))? {
            workload.grow_to(machine.model.sectors());
        }
        Ok(())
    }

    /// While it is paused another process may have written the image, so its metadata is read again; or nobody has.
    fn pause(
        &self,
        machine: &mut Machine,
        workload: &mut Workload,
        rng: &mut Rng,
    ) -> Result<(), String> {
        if !machine.pause(workload)? {
            return Ok(());
        }
        let mut again = !self.scene.config.raw && rng.chance(192);
        if self.scene.config.swaps && rng.chance(160) {
            self.swap(machine, rng);
            workload.grow_to(machine.model.sectors());
            again = true;
        }
        let header = |machine: &Machine| {
            let file = machine.world.contents(IMAGE);
            let header = again.then(|| Header::parse(file.bytes(), file.len()));
            header.transpose().map_err(|error| error.to_string())
        };
        let now = header(machine)?;
        if machine.resume(now)? {
            return Ok(());
        }
        // It stays paused, and can be resumed as soon as the cause is gone. What it has written by then is not somebody else's.
        machine.world.plan_faults(Vec::new());
        let now = header(machine)?;
        if machine.resume(now)? {
            Ok(())
        } else {
            Err("without errors it cannot be resumed either".to_owned())
        }
    }

    /// The process is killed, and another goes on with what it finds: all of what was written, durable or not.
    fn succession(&self, machine: &mut Machine, rng: &mut Rng) -> Result<(), String> {
        machine.die()?;
        let now = machine.world.now();
        let view = if self.scene.config.outlives {
            machine.model.after_kill(now)
        } else {
            machine.model.after_cut(now)
        };
        let files = self.scene.files_in(&machine.world);
        let killed = |error| format!("after the process was killed: {error}");
        let found = self.scene.judge(&files, &view).map_err(killed)?;
        let (options, leaked) = if rng.chance(128) {
            (self.scene.config.repairing(), 0)
        } else {
            (self.scene.config.options(), found.leaks)
        };
        let layers = self.scene.layers(&files).map_err(killed)?;
        machine
            .succeed(layers, options, (&found.guest, leaked))
            .map_err(killed)
    }

    /// Another process has put another image in the place of this one.
    fn swap(&self, machine: &mut Machine, rng: &mut Rng) {
        let (_, past) = machine.model_at(u64::MAX);
        // What was there before the power failed has stamps of its own, too.
        let number = 1 + past + 16 * u64::from(self.depth - 1);
        let (sectors, room) = (machine.model.sectors(), machine.model.room());
        // It may have grown the disk, too.
        let sectors = sectors + rng.below(room - sectors + 1);
        let built = self.scene.another(sectors, number, rng);
        let device = machine.world.contents(IMAGE).clone();
        if !device.is_fixed() || built.bytes.len() <= device.bytes().len() {
            machine.replace(built);
        }
    }

    fn end(
        &self,
        mut machine: Machine,
        rng: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        machine.drain()?;
        let world = machine.world.clone();
        // Some devices are never closed.
        let mut closed = rng.chance(192);
        if closed {
            let (poisoned, injected) = (machine.is_poisoned(), world.injected());
            match machine.close() {
                Err(error) if !poisoned && world.injected() == injected => return Err(error),
                Err(_) => closed = false,
                Ok(()) if poisoned || world.failed_syncs() > 0 => {
                    return Err("closing hid that a sync has failed".to_owned());
                }
                Ok(()) => {}
            }
        }
        if self.depth == 1 {
            (outcome.ops, outcome.syncs) = (world.op_count(), world.sync_count());
            (outcome.kinds, outcome.asked) = (world.kinds(), world.asked());
            outcome.census.add(world.census());
            outcome.injected += world.injected();
        }
        outcome.trace ^= world.trace_hash().rotate_left(self.depth);
        if let Some(complaint) = world.complaints().first() {
            return Err(format!("the storage complains: {complaint}"));
        }
        if closed {
            let view = machine.model.after_cut(world.now());
            let files = self.scene.files_in(&world);
            let found = self
                .scene
                .judge(&files, &view)
                .map_err(|error| format!("after closing: {error}"))?;
            if self.depth == 1 && self.injection.is_none() && !self.scene.config.raw {
                self.scene
                    .table_stays(machine.opened.bytes(), files[0].bytes())?;
            }
            if found.dirty {
                return Err("after closing: the image is marked dirty".to_owned());
            }
            let leaks = self.leaks.max(machine.leaked);
            if found.leaks > leaks {
                return Err(format!(
                    "after closing: {} clusters have leaked, {leaks} before",
                    found.leaks
                ));
            }
        }
        self.cut(&machine, rng, outcome)
    }

    /// The cause of the errors is gone: now everything works again, or it is poisoned and says so.
    fn recover(&self, machine: &mut Machine, workload: &mut Workload) -> Result<(), String> {
        machine.settle()?;
        if machine.world.injected() == 0 {
            // It comes while the device is closed, if at all.
            return Ok(());
        }
        machine.world.plan_faults(Vec::new());
        if machine.world.failed_syncs() > 0 && !machine.is_poisoned() {
            return Err("a sync failed, and the device is not poisoned".to_owned());
        }
        // O11: a header that can be neither changed nor restored may be either of the two.
        let header_lost = machine.world.injected_headers() > 1;
        if machine.is_poisoned() && machine.world.injected_syncs() == 0 && !header_lost {
            return Err("the device is poisoned, and no sync has failed".to_owned());
        }
        machine.expect_errors(machine.is_poisoned());
        for _ in 0..20 {
            machine.ask(workload.next_ask())?;
        }
        machine.drain()?;
        machine.read_all()
    }

    fn points(&self, machine: &Machine, rng: &mut Rng) -> BTreeSet<usize> {
        let events = machine.world.log().events.len();
        let cuts = if self.depth == 1 { self.effort.cuts } else { 2 };
        if cuts >= events as u64 {
            return (1..=events).collect();
        }
        let mut points: BTreeSet<usize> = (0..cuts)
            .filter(|_| events > 0)
            .map(|_| 1 + rng.index(events))
            .collect();
        if (self.scene.config.left_open || self.scene.config.dies) && self.depth == 1 {
            // A repair is short; what it does last is to say that all is well.
            for opening in machine.openings.iter().filter(|range| !range.is_empty()) {
                points.extend(opening.end.saturating_sub(10).max(opening.start + 1)..=opening.end);
                points.extend((0..4).map(|_| opening.start + 1 + rng.index(opening.len())));
            }
        }
        points
    }

    fn cut(&self, machine: &Machine, rng: &mut Rng, outcome: &mut Outcome) -> Result<(), String> {
        let points = self.points(machine, rng);
        let log = machine.world.log();
        let mut known = HashSet::new();
        let mut cursor = CrashCursor::new(&log);
        let mut lot = rng.fork(5);
        while cursor.advance(&log) {
            let position = cursor.position();
            if !points.contains(&position) {
                continue;
            }
            outcome.cuts += 1;
            let (now, _) = log.events[position - 1];
            let (model, past) = machine.model_at(now);
            let view = model.after_cut(now);
            // What was promised of another disk counts no more.
            let promises = model.promises_at(now) | past << 48;
            // What lies where, with everything that is pending in place.
            let owners = checker::check(machine.world.contents(IMAGE).bytes()).owners;
            let classify = |file: FileId, change: &Change| match file {
                IMAGE => Class::from(owners.at(change.range().0)),
                _ => Class::Data,
            };
            let mut violation = None;
            let mut visit = |state: &crate::crash::State<'_>| {
                outcome.states += 1;
                match self.state(state.files, &view, model, &mut lot, outcome) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        let name = state.choice.name;
                        violation = Some(format!(
                            "cut at event {position} (moment {now}), {name}: {error}"
                        ));
                        ControlFlow::Break(())
                    }
                }
            };
            cursor.enumerate(
                rng,
                &self.effort.limits,
                &classify,
                (&mut known, promises),
                &mut visit,
            );
            if let Some(violation) = violation {
                return Err(violation);
            }
            if self.scene.config.outlives {
                self.kill(&mut cursor, now, model, &mut lot, outcome)
                    .map_err(|error| {
                        format!("killed at event {position} (moment {now}): {error}")
                    })?;
            }
        }
        Ok(())
    }

    /// The process is killed instead: what has completed must be there, flushed or not (O23).
    fn kill(
        &self,
        cursor: &mut CrashCursor,
        now: u64,
        model: &Model,
        lot: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let view = model.after_kill(now);
        for _ in 0..KILLS {
            let choice = cursor.killed(lot);
            outcome.states += 1;
            cursor.with_state(&choice, |state| {
                self.state(state.files, &view, model, lot, outcome)
            })?;
        }
        Ok(())
    }

    fn state(
        &self,
        files: &[Contents],
        view: &crate::model::View,
        model: &Model,
        lot: &mut Rng,
        outcome: &mut Outcome,
    ) -> Result<(), String> {
        let found = self.scene.judge(files, view)?;
        outcome.largest_leak = outcome.largest_leak.max(found.leaks);
        // QEMU would not open it for a check without a repair.
        let unfit = self.scene.config.raw
            || self.scene.config.ciphered
            || self.scene.config.miscounted && found.dirty;
        if self.effort.qemu > 0 && !unfit && lot.below(self.effort.qemu) == 0 {
            outcome.qemu += 1;
            qemu::judge(files, &found.guest, found.copied_clear > 0)?;
        }
        let drawn = lot.below(self.effort.reopen);
        if drawn == 1 {
            outcome.states += self.scene.repair(files, &found, view, lot)?;
            return Ok(());
        }
        if drawn != 0 {
            return self.scene.open_and_close(files, lot.chance(64));
        }
        outcome.reopened += 1;
        let driving = self.scene.driving(lot);
        let mut again = self
            .scene
            .machine(files, &found.guest, model, driving, Vec::new(), lot)?;
        again.read_all()?;
        let run = Run {
            leaks: found.leaks,
            depth: self.depth + 1,
            injection: None,
            ..*self
        };
        if self.depth >= self.effort.depth {
            return again.close();
        }
        run.whole(again, self.scene.workload(lot), 50, lot, outcome)
            .map_err(|error| format!("reopened: {error}"))
    }
}

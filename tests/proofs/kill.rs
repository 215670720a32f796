//! `urus serve` killed at random moments under a stamping load, started again on the same image, and every sector
//! verified. On plain files, and on a file system whose disk has sectors of 4096 bytes.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use urus_sim::rng::Rng;
use urus_tests::load::{self, Disk, Habits, Weights};
use urus_tests::mounted::{Loop, Mount};
use urus_tests::served::Serve;
use urus_tests::{Driver, KIB, MIB, Served, program, urus};

use crate::Arguments;
use crate::campaign::{Plan, Start, guarded, leaks, read_by_qemu, read_used};
use crate::tally::Tally;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// Of clusters of 64 KiB: in the first two slices of one L2 table, in a table whose L1 entry lies in another sector (512 bytes of L1 are
/// 32 GiB, 4096 are 256), and near the end.
const FAR_64K: &[(u64, u64)] = &[
    (0, 4 * MIB),
    (31 * MIB, 2 * MIB),
    (40 * GIB, 2 * MIB),
    (257 * GIB, 2 * MIB),
    (8 * TIB - MIB, MIB),
];
/// Of clusters of 2 MiB: a slice has 1 GiB, an L1 entry 512 GiB, a sector of them 32 TiB or 256.
const FAR_2M: &[(u64, u64)] = &[
    (0, 8 * MIB),
    (GIB - 2 * MIB, 4 * MIB),
    (40 * TIB, 4 * MIB),
    (300 * TIB - 2 * MIB, 2 * MIB),
];
/// Of 512 bytes: an L1 entry for every 32 KiB, a sector of them for every 2 MiB.
const FAR_512: &[(u64, u64)] = &[(0, MIB), (3 * MIB, 512 * KIB), (GIB - 512 * KIB, 512 * KIB)];
/// Of 4 KiB: a sector of L1 entries has 128 MiB or 1 GiB.
const FAR_4K: &[(u64, u64)] = &[
    (0, 6 * MIB),
    (200 * MIB, MIB),
    (3 * GIB, MIB),
    (64 * GIB - MIB, MIB),
];
/// Where the host clusters lie as far apart as those of the guest: with 64-bit refcounts a slice of them has 32 MiB, a block 512.
const FAR_HOST: &[(u64, u64)] = &[
    (0, 4 * MIB),
    (100 * MIB, 2 * MIB),
    (700 * MIB, 2 * MIB),
    (3 * GIB, 2 * MIB),
];
const FAR_HOST_OPTIONS: &str = ",refcount_bits=64,preallocation=metadata";

const FILES: [Plan; 17] = [
    Plan::new("64k", 64 * KIB, Start::Empty),
    Plan::new("64k over zlib", 64 * KIB, Start::OverZlib),
    Plan::new("512", 512, Start::Empty),
    Plan::new("64k compressed", 64 * KIB, Start::Compressed),
    Plan::new("4k over zlib, direct", 4 * KIB, Start::OverZlib)
        .served("--num-queues 4 --cache none"),
    Plan::new("1k, few L2 slices", KIB, Start::Empty)
        .served("--num-queues 4 --l2-cache-size 65536"),
    Plan::new("2k, 1-bit refcounts", 2 * KIB, Start::Empty).made(",refcount_bits=1"),
    Plan::new("16k, lazy refcounts", 16 * KIB, Start::Empty).made(",lazy_refcounts=on"),
    Plan::new("64k v2 over raw", 64 * KIB, Start::OverRaw).made(",compat=0.10"),
    Plan::new("2M", 2 * MIB, Start::Empty),
    Plan::new("512 compressed, 64-bit, direct", 512, Start::Compressed)
        .made(",refcount_bits=64")
        .served("--num-queues 3 --cache none"),
    Plan::new("128k over raw, discards ignored", 128 * KIB, Start::OverRaw)
        .served("--num-queues 2 --discard ignore"),
    Plan::new("64k, 8 TiB", 64 * KIB, Start::Empty).far(8 * TIB, FAR_64K),
    Plan::new("2M, 300 TiB", 2 * MIB, Start::Empty).far(300 * TIB, FAR_2M),
    Plan::new("512, 1 GiB", 512, Start::Empty).far(GIB, FAR_512),
    Plan::new(
        "4k over zlib, 64 GiB, few L2 slices",
        4 * KIB,
        Start::OverZlib,
    )
    .served("--num-queues 4 --l2-cache-size 65536")
    .far(64 * GIB, FAR_4K),
    Plan::new("64k, far host clusters", 64 * KIB, Start::Empty)
        .made(FAR_HOST_OPTIONS)
        .far(4 * GIB, FAR_HOST),
];

const DIRECT: &str = "--num-queues 4 --cache none";
const LARGE_SECTORS: [Plan; 13] = [
    Plan::new("512", 512, Start::Empty).served(DIRECT),
    Plan::new("64k over zlib", 64 * KIB, Start::OverZlib).served(DIRECT),
    Plan::new("1k compressed", KIB, Start::Compressed).served(DIRECT),
    Plan::new("2k", 2 * KIB, Start::Empty).served(DIRECT),
    Plan::new("4k over raw", 4 * KIB, Start::OverRaw).served(DIRECT),
    Plan::new("8k over zlib", 8 * KIB, Start::OverZlib).served(DIRECT),
    Plan::new("16k", 16 * KIB, Start::Empty).served(DIRECT),
    Plan::new("32k compressed", 32 * KIB, Start::Compressed).served(DIRECT),
    Plan::new("512 over raw", 512, Start::OverRaw).served(DIRECT),
    Plan::new("64k, 8 TiB", 64 * KIB, Start::Empty)
        .served(DIRECT)
        .far(8 * TIB, FAR_64K),
    Plan::new("2M, 300 TiB", 2 * MIB, Start::Empty)
        .served(DIRECT)
        .far(300 * TIB, FAR_2M),
    Plan::new("4k over raw, 64 GiB", 4 * KIB, Start::OverRaw)
        .served(DIRECT)
        .far(64 * GIB, FAR_4K),
    Plan::new("64k, far host clusters", 64 * KIB, Start::Empty)
        .made(FAR_HOST_OPTIONS)
        .served(DIRECT)
        .far(4 * GIB, FAR_HOST),
];

const FIGURES: [&str; 8] = [
    "kills", "stops", "requests", "sectors", "checks", "leaked", "repaired", "images",
];

/// The part `kill`.
pub(crate) fn on_files(arguments: &Arguments) -> Tally {
    run("kill", &FILES, arguments, 60, |_| None)
}

/// The part `blocks`.
pub(crate) fn on_large_sectors(arguments: &Arguments) -> Tally {
    run("blocks", &LARGE_SECTORS, arguments, 27, |directory| {
        Some(Disk4k::mount(directory))
    })
}

/// XFS on a loop device with sectors of 4096 bytes: direct I/O that is not aligned to them fails.
struct Disk4k {
    // Unmounted before it is detached.
    mount: Mount,
    _device: Loop,
}

impl Disk4k {
    fn mount(directory: &Path) -> Self {
        let file = directory.join("disk");
        let disk = std::fs::File::create(&file).expect("a file for a disk");
        // Sparse; mkfs.xfs makes none below 300 MiB.
        disk.set_len(512 * MIB).expect("a sparse file");
        let device = Loop::attach_with(&file, "-b 4096 --direct-io=off");
        program("mkfs.xfs").words("-q -f").arg(device.device()).ok();
        let mount = Mount::device(device.device(), &directory.join("mnt"));
        Self {
            mount,
            _device: device,
        }
    }

    /// That the disk is what it is meant to be: a read of 512 bytes must be refused. Else nothing would be proved.
    fn assert_strict(&self) {
        let file = self.mount.path().join("probe");
        std::fs::write(&file, vec![1; 8192]).expect("writing");
        let read = |bytes: u32| {
            let dd = program("dd").words("iflag=direct of=/dev/null count=1");
            let dd = dd
                .arg(format!("if={}", file.display()))
                .arg(format!("bs={bytes}"));
            dd.run().status.success()
        };
        assert!(
            read(4096) && !read(512),
            "this disk does not ask for sectors of 4096 bytes"
        );
    }
}

fn run(
    part: &'static str,
    plans: &[Plan],
    arguments: &Arguments,
    rounds: u64,
    disk: impl Fn(&Path) -> Option<Disk4k>,
) -> Tally {
    let mut tally = Tally::new(part, arguments.seed, arguments.budget(rounds), &FIGURES);
    let plans: Vec<&Plan> = plans
        .iter()
        .filter(|plan| arguments.plan.as_ref().is_none_or(|name| name == plan.name))
        .collect();
    if plans.is_empty() {
        tally
            .violations
            .push(format!("no plan of {part} has that name"));
        return tally;
    }
    if let Err(blind) = liar_is_found(part, arguments) {
        tally.violations.push(blind);
    }
    // Every kind of image has its share, and long ones where there is time; then what is left goes to the first ones once more.
    let turns = (tally.left() / plans.len() as u64).clamp(1, 25);
    let mut number = 0;
    while tally.goes_on() {
        let plan = plans[usize::try_from(number).expect("small") % plans.len()];
        let before = tally.done();
        let turns = turns.min(tally.left());
        let seed = arguments.seed.wrapping_add(number);
        let outcome = guarded(part, plan.name, seed, |scratch, rng| {
            let mounted = disk(scratch.path());
            let directory = mounted
                .as_ref()
                .map_or(scratch.path(), |disk| disk.mount.path());
            if let Some(disk) = &mounted {
                disk.assert_strict();
            }
            campaign(plan, directory, rng, arguments, turns, &mut tally)
        });
        tally.violations.extend(outcome.err());
        tally.add_kind(plan.name, tally.done() - before);
        number += 1;
    }
    let unseen: Vec<&str> = plans
        .iter()
        .map(|plan| plan.name)
        .filter(|name| tally.of_kind(name) == 0)
        .collect();
    if arguments.minutes.is_none() && rounds >= plans.len() as u64 && !unseen.is_empty() {
        tally.violations.push(format!(
            "kinds of images that were never killed: {unseen:?}"
        ));
    }
    tally
}

/// How a round ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Kill,
    /// SIGTERM, and SIGKILL while the image is being closed.
    KillWhileClosing,
    /// SIGTERM.
    Stop,
}

/// The rounds of one image.
fn campaign(
    plan: &Plan,
    directory: &Path,
    rng: &mut Rng,
    arguments: &Arguments,
    turns: u64,
    tally: &mut Tally,
) -> Result<(), String> {
    let (image, mut disk) = plan.build(directory);
    tally.add("images", 1);
    let mut stops = 0;
    let mut turn = 0;
    // The first driver differs from image to image.
    let first = rng.below(2);
    while turn < turns {
        let end = match rng.below(10) {
            0 | 1 => End::Stop,
            2 => End::KillWhileClosing,
            _ => End::Kill,
        };
        if end == End::Stop {
            // A clean stop leaks nothing, which shows on an image that has no leaks before.
            tally.add("repaired", leaks(&image)?);
            urus().words("check -q -r leaks").arg(&image).ok();
            none_leaked(&image, "after its repair")?;
        }
        let driver = arguments.driver(first + turn + stops);
        let served = Serve::new(&image, driver).with(plan.serve).start();
        let round = turn;
        let context = |text: String| format!("round {round}, {driver:?}, {end:?}: {text}");
        let bytes = read_used(&served, &disk).map_err(context)?;
        disk = disk.judge_after_kill(&bytes).map_err(context)?;
        tally.add("sectors", disk.ranges().bytes() / load::SECTOR);
        let habits = habits(plan, rng);
        // Some in the very beginning, when tables are made, the others in the middle of things.
        let requests = if rng.chance(80) {
            rng.below(40)
        } else {
            rng.below(2500)
        };
        ended(served, &disk, &habits, rng, end, requests).map_err(context)?;
        tally.add("requests", disk.answered());
        disk.faultless().map_err(context)?;
        if end == End::Stop {
            disk.closed_cleanly();
            none_leaked(&image, "after a clean stop").map_err(context)?;
            stops += 1;
            tally.add("stops", 1);
        } else {
            turn += 1;
            tally.add("kills", 1);
            if turn < turns && rng.chance(24) {
                turn += 1;
                // Once more, before it has even opened: what it repairs then must survive that too.
                Serve::new(&image, driver)
                    .with(plan.serve)
                    .killed_after(Duration::from_micros(rng.below(40_000)));
                tally.add("kills", 1);
            }
        }
        if rng.chance(64) {
            tally.most("leaked", leaks(&image).map_err(context)?);
            tally.add("checks", 1);
        }
        if rng.chance(32) {
            // A reader that shares nothing with urus finds the same.
            let copy = directory.join("copy");
            let bytes = read_by_qemu(&image, &copy, &disk).map_err(context)?;
            disk.judge_after_kill(&bytes)
                .map_err(|text| context(format!("read by QEMU: {text}")))?;
        }
    }
    // The last round is judged too.
    let served = Served::start(&image, arguments.driver(turn));
    disk.judge_after_kill(&read_used(&served, &disk)?)?;
    served.stop();
    read_by_qemu(&image, &directory.join("copy"), &disk)?;
    tally.most("leaked", leaks(&image)?);
    tally.add("checks", 1);
    Ok(())
}

fn none_leaked(image: &Path, when: &str) -> Result<(), String> {
    match leaks(image)? {
        0 => Ok(()),
        leaks => Err(format!("{leaks} leaked clusters {when}")),
    }
}

fn habits(plan: &Plan, rng: &mut Rng) -> Habits {
    let weights = match rng.below(4) {
        0 => Weights {
            trim: 40,
            flush: 15,
            ..Weights::MIXED
        },
        1 => Weights {
            flush: 1,
            fua: 1,
            ..Weights::MIXED
        },
        _ => Weights::MIXED,
    };
    Habits {
        connections: 2 + rng.index(4),
        depth: 1 + rng.index(24),
        cluster: plan.cluster,
        longest: (plan.cluster * 3).clamp(8 * KIB, 256 * KIB),
        weights,
        may_fill_up: false,
        lies: false,
    }
}

/// Runs the load until so many requests are answered, and ends the server meanwhile.
fn ended(
    mut served: Served,
    disk: &Disk,
    habits: &Habits,
    rng: &mut Rng,
    end: End,
    requests: u64,
) -> Result<(), String> {
    let (socket, stop) = (served.socket(), AtomicBool::new(false));
    let (seed, pause) = (rng.next_u64(), Duration::from_micros(rng.below(3000)));
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(disk, &socket, habits, seed, &stop));
        while disk.answered() < requests && !load.is_finished() {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(pause);
        let early = load.is_finished() || !served.is_running();
        let log = served.log();
        disk.expect_the_end();
        match end {
            _ if early => drop(served),
            End::Kill => served.kill(),
            End::KillWhileClosing => {
                served.signal(rustix::process::Signal::TERM);
                std::thread::sleep(pause);
                served.kill();
            }
            End::Stop => drop(served.stop()),
        }
        stop.store(true, Ordering::Release);
        load.join().map_err(|_| "the load panicked".to_owned())?;
        if early {
            disk.faultless()?;
            return Err(format!("server or load ended by itself:\n{log}"));
        }
        Ok(())
    })
}

/// Who tests the tester: a client that never flushes and says it did must be caught within some kills.
fn liar_is_found(part: &str, arguments: &Arguments) -> Result<(), String> {
    const KILLS: u64 = 10;
    let plan = Plan::new("a liar's", 64 * KIB, Start::Empty);
    let mut found = false;
    guarded(part, plan.name, arguments.seed, |scratch, rng| {
        for kill in 0..KILLS {
            let directory = scratch.file(&kill.to_string());
            std::fs::create_dir(&directory).expect("a directory");
            let (image, disk) = plan.build(&directory);
            let driver: Driver = arguments.driver(kill);
            let served = Serve::new(&image, driver).with(plan.serve).start();
            let habits = Habits {
                lies: true,
                ..habits(&plan, rng)
            };
            ended(served, &disk, &habits, rng, End::Kill, 500)?;
            disk.faultless()?;
            let served = Served::start(&image, driver);
            let judged = disk.judge_after_kill(&read_used(&served, &disk)?);
            served.stop();
            if judged.is_err() {
                found = true;
                return Ok(());
            }
        }
        Ok(())
    })?;
    if found {
        Ok(())
    } else {
        Err(format!(
            "{KILLS} kills of a server that was never asked to flush lost nothing: the judge is blind"
        ))
    }
}

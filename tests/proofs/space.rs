//! A disk that fills up under load and is freed again: an ext4 of some MiB on a loop device. What fails for want of
//! space says so and changes nothing, the device goes on when there is room, and nothing has leaked at the end.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use urus_sim::rng::Rng;
use urus_tests::load::{self, Disk, Habits, SECTOR, Weights};
use urus_tests::mounted::{Loop, Mount};
use urus_tests::nbd::{Client, Command};
use urus_tests::program::poll;
use urus_tests::served::Serve;
use urus_tests::{KIB, MIB, Served, content, program, qemu, urus};

use crate::Arguments;
use crate::campaign::{Plan, Start, guarded, leaks, read_all};
use crate::tally::Tally;

const DISK: u64 = 32 * MIB;
/// How often each image is filled.
const TURNS: u64 = 3;
/// Until what was discarded can be used again.
const PATIENCE: Duration = Duration::from_secs(20);
const BALLAST: usize = 4 << 20;
/// Images that a full disk cannot hold.
const PLANS: [Plan; 6] = [
    Plan::new("64k", 64 * KIB, Start::Empty).sized(64 * MIB),
    Plan::new("512", 512, Start::Empty).sized(32 * MIB),
    Plan::new("4k over zlib, direct", 4 * KIB, Start::OverZlib)
        .served("--num-queues 4 --cache none")
        .sized(48 * MIB),
    Plan::new("64k compressed", 64 * KIB, Start::Compressed).sized(64 * MIB),
    Plan::new("2k, few L2 slices", 2 * KIB, Start::Empty)
        .served("--num-queues 4 --l2-cache-size 65536")
        .sized(32 * MIB),
    Plan::new("1M, direct", MIB, Start::Empty)
        .served("--num-queues 4 --cache none")
        .sized(64 * MIB),
];

/// The part `space`.
pub(crate) fn run(arguments: &Arguments) -> Tally {
    let figures = [
        "fills", "refused", "requests", "kills", "stops", "sectors", "late",
    ];
    let mut tally = Tally::new("space", arguments.seed, arguments.budget(12), &figures);
    let plans: Vec<&Plan> = PLANS
        .iter()
        .filter(|plan| arguments.plan.as_ref().is_none_or(|name| name == plan.name))
        .collect();
    let mut number = 0;
    while tally.goes_on() && !plans.is_empty() {
        let plan = plans[usize::try_from(number).expect("small") % plans.len()];
        let seed = arguments.seed.wrapping_add(number);
        let outcome = guarded("space", plan.name, seed, |scratch, rng| {
            let file = scratch.file("disk");
            let disk = std::fs::File::create(&file).expect("a file for a disk");
            disk.set_len(DISK).expect("a sparse file");
            program("mke2fs")
                .words("-q -F -t ext4 -m 0")
                .arg(&file)
                .ok();
            let device = Loop::attach(&file);
            let mount = Mount::device(device.device(), &scratch.file("mnt"));
            let done = campaign(plan, mount.path(), rng, arguments, &mut tally);
            if done.is_ok() {
                mount.unmount();
                device.detach();
            }
            done
        });
        tally.violations.extend(outcome.err());
        number += 1;
    }
    tally
}

/// Fills the disk three times, freed in another way each time.
fn campaign(
    plan: &Plan,
    directory: &Path,
    rng: &mut Rng,
    arguments: &Arguments,
    tally: &mut Tally,
) -> Result<(), String> {
    let (image, mut disk) = plan.build(directory);
    // Room that the host can give back, once for each turn.
    let ballast = |turn: u64| directory.join(format!("ballast{turn}"));
    for turn in 0..TURNS {
        std::fs::write(ballast(turn), vec![1; BALLAST]).expect("filling a part of the disk");
    }
    let first = rng.below(2);
    for turn in 0..TURNS {
        if !tally.goes_on() {
            break;
        }
        let ballast = ballast(turn);
        let leaked = leaks(&image)?;
        if leaked > 0 {
            urus().words("check -q -r leaks").arg(&image).ok();
        }
        let driver = arguments.driver(first + turn);
        let context = |text: String| format!("turn {turn}, {driver:?}: {text}");
        let served = Serve::new(&image, driver).with(plan.serve).start();
        disk = disk
            .judge_after_kill(&read_all(&served).map_err(context)?)
            .map_err(context)?;
        fill(plan, &served, &disk, rng).map_err(context)?;
        tally.add("fills", 1);
        tally.add("refused", disk.full());
        tally.add("sectors", plan.size / SECTOR);
        if turn == 1 {
            // Killed while full.
            disk.expect_the_end();
            served.kill();
            tally.add("kills", 1);
        } else {
            freed(plan, &served, &disk, &ballast, turn == 2, tally).map_err(context)?;
            disk.expect_the_end();
            served.stop();
            disk.closed_cleanly();
            tally.add("stops", 1);
            match leaks(&image)? {
                0 => {}
                leaks => {
                    return Err(context(format!(
                        "{leaks} leaked clusters after a clean stop"
                    )));
                }
            }
        }
        tally.add("requests", disk.answered());
        disk.faultless().map_err(context)?;
    }
    leaks(&image)?;
    let served = Served::start(&image, arguments.driver(first));
    let bytes = read_all(&served)?;
    served.stop();
    disk.judge_after_kill(&bytes)?;
    // QEMU finds the same; there is no room for its copy on the small disk.
    let raw = directory.parent().expect("a scratch directory").join("raw");
    qemu::convert_to_raw(&image, &raw);
    if content::bytes(&raw) == bytes {
        Ok(())
    } else {
        Err("QEMU reads something else".to_owned())
    }
}

/// Writes until there is no more room, and on for a while; then everything must still read as it should.
fn fill(plan: &Plan, served: &Served, disk: &Disk, rng: &mut Rng) -> Result<(), String> {
    let habits = Habits {
        connections: 4,
        depth: 1 + rng.index(8),
        cluster: plan.cluster,
        longest: 128 * KIB,
        weights: Weights::FILL,
        may_fill_up: true,
        lies: false,
    };
    let (socket, stop, seed) = (served.socket(), AtomicBool::new(false), rng.next_u64());
    let refused = 20 + rng.below(200);
    // More than enough to write every cluster several times.
    let most = 64 * plan.size / habits.longest + 20_000;
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(disk, &socket, &habits, seed, &stop));
        while disk.full() < refused && disk.answered() < most && !load.is_finished() {
            std::thread::sleep(Duration::from_micros(500));
        }
        stop.store(true, Ordering::Release);
        load.join().map_err(|_| "the load panicked".to_owned())
    })?;
    disk.faultless()?;
    if disk.full() == 0 {
        return Err(format!(
            "{} requests did not fill the disk",
            disk.answered()
        ));
    }
    disk.judge_live(&read_all(served)?)
        .map_err(|text| format!("while full: {text}"))
}

fn is_full(error: &str) -> bool {
    error.ends_with("error 28")
}

/// Makes room, by a discard or by removing the other file; the device must go on, without a restart.
fn freed(
    plan: &Plan,
    served: &Served,
    disk: &Disk,
    ballast: &Path,
    by_discard: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    // A write into a cluster may take all of its space on the disk; half of what was freed is enough.
    let writes = (BALLAST as u64 / 2 / plan.cluster.max(64 * KIB)).min(24);
    let io = |error: std::io::Error| format!("connecting: {error}");
    let mut client = Client::connect(&served.socket()).map_err(io)?;
    let sectors = plan.size / SECTOR;
    if by_discard {
        // All but the last eighth. A full disk refuses neither this nor the flush: all that they need has its room already.
        disk.ask(&mut client, Command::Trim, 0, sectors / 8 * 7)
            .map_err(|error| format!("the discard while full: {error}"))?;
    } else {
        std::fs::remove_file(ballast).map_err(|error| format!("the ballast: {error}"))?;
    }
    disk.ask(&mut client, Command::Flush, 0, 0)
        .map_err(|error| format!("the flush after making room: {error}"))?;
    for number in 0..writes {
        let fua = number % 8 == 7;
        let lba = sectors / writes * number;
        // Clusters are given back to the disk some time after the flush that let go of them.
        let written = poll(PATIENCE, || {
            let asked = disk.ask(&mut client, Command::Write { fua }, lba, 128);
            let full = asked.as_ref().is_err_and(|error| is_full(error));
            if full {
                tally.add("late", 1);
            }
            (!full).then_some(asked)
        });
        written
            .unwrap_or_else(|| Err("error 28".to_owned()))
            .map_err(|error| format!("there is room again: {error}"))?;
    }
    disk.ask(&mut client, Command::Flush, 0, 0)?;
    disk.judge_live(&read_all(served)?)
        .map_err(|text| format!("after making room: {text}"))
}

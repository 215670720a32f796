//! The thirty tests of the proposal that this project began from: io_uring against plain system calls, on images with content.

use std::path::Path;
use std::process::ExitCode;

use indicatif::ProgressBar;
use urus::{Device, IoDriver, OpenOptions};

use super::client::Target;
use super::images::{Images, Kind, Missing};
use super::progress::progress;
use super::report::Pair;
use super::slices::Plan;
use super::suite_report::{LeftOut, Row, SuiteReport};
use super::{Args, Mode, chart, check_names, control, interruption, measure, slice_time};
use crate::failure::{Failure, Outcome};
use crate::output::{print, print_json};
use crate::signals::Stop;

/// How a test reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// One cluster after the other, nothing in the page cache.
    Read,
    /// 4 KiB at random places, nothing in the page cache.
    RandomRead,
    /// One cluster after the other, everything in the page cache.
    ReadWarm,
}

impl Access {
    const ALL: [Self; 3] = [Self::Read, Self::RandomRead, Self::ReadWarm];

    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::RandomRead => "random_read",
            Self::ReadWarm => "read_warm",
        }
    }

    fn block_bytes(self) -> u64 {
        match self {
            Self::RandomRead => 4 << 10,
            Self::Read | Self::ReadWarm => 64 << 10,
        }
    }

    fn mode(self) -> Mode {
        match self {
            Self::RandomRead => Mode::Randread,
            Self::Read | Self::ReadWarm => Mode::Read,
        }
    }
}

/// One of the thirty.
#[derive(Clone, Copy, Debug)]
struct Test {
    kind: Kind,
    access: Access,
    queues: u16,
}

impl Test {
    /// `qcow2_random_read`, `zlib_read_4_queues`.
    fn name(self) -> String {
        let queues = match self.queues {
            1 => String::new(),
            queues => format!("_{queues}_queues"),
        };
        format!("{}_{}{queues}", self.kind.name(), self.access.name())
    }
}

/// All thirty, those of one image together.
fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for kind in Kind::ALL {
        for queues in [1, 4] {
            tests.extend(Access::ALL.map(|access| Test {
                kind,
                access,
                queues,
            }));
        }
    }
    tests
}

/// Those that were asked for.
fn chosen(only: &[String]) -> Result<Vec<Test>, Failure> {
    let all = tests();
    let names: Vec<String> = all.iter().map(|test| test.name()).collect();
    check_names(only, &names)?;
    Ok(all
        .into_iter()
        .filter(|test| only.is_empty() || only.contains(&test.name()))
        .collect())
}

pub(super) fn run(args: &Args, stop: &mut Stop) -> Outcome {
    let suite = &args.suite_args;
    let tests = chosen(&suite.only)?;
    let size = suite.size(1 << 30);
    if size < 1 << 20 {
        return Err(Failure::usage("--size: a MiB is the least"));
    }
    let images = Images::in_dir(&suite.dir, size)?;
    let total = u64::try_from(tests.len()).unwrap_or(u64::MAX);
    let bar = progress(total.saturating_mul(args.pairs.into()));
    let mut report = SuiteReport::new(args, size);
    for test in tests {
        bar.set_message(test.name());
        let pairs = match images.get(test.kind) {
            Ok(path) => one(args, test, &path, stop, &bar)?,
            Err(Missing::Failed(failure)) => return Err(failure),
            Err(Missing::Program(why)) => {
                report.left_out.push(LeftOut {
                    name: test.name(),
                    why,
                });
                bar.inc(args.pairs.into());
                continue;
            }
        };
        let Some(pairs) = pairs else {
            bar.finish_and_clear();
            return Err(interruption());
        };
        report.rows.push(Row::new(test.name(), &pairs));
    }
    bar.finish_and_clear();
    if let Some(dir) = &suite.svg {
        chart::draw(
            dir,
            "Operations per second, io_uring / plain system calls",
            &report.bars(),
        )?;
    }
    if args.json {
        print_json(&report);
    } else {
        print(&report.text());
    }
    Ok(ExitCode::SUCCESS)
}

/// Both drivers on one image; None when a signal came.
fn one(
    args: &Args,
    test: Test,
    path: &Path,
    stop: &mut Stop,
    bar: &ProgressBar,
) -> Result<Option<Vec<Pair>>, Failure> {
    let io_uring = open(args, path, IoDriver::IoUring)?;
    let blocking = open(args, path, IoDriver::Blocking)?;
    let block_bytes = test.access.block_bytes();
    let plan = Plan {
        block_bytes,
        span: io_uring.size() / block_bytes * block_bytes,
        depth: args.depth,
        queues: test.queues,
        mode: test.access.mode(),
        slice: slice_time(args, 3.0),
        cold: test.access != Access::ReadWarm,
        writer: false,
        registered: false,
    };
    if !plan.cold {
        control::warm(&io_uring, plan.span)?;
        control::warm(&blocking, plan.span)?;
    }
    let targets = [Target::Device(&io_uring), Target::Device(&blocking)];
    let pairs = measure(plan, args.pairs, targets, stop, || {
        bar.inc(1);
    })?;
    io_uring.close()?;
    blocking.close()?;
    Ok(pairs)
}

fn open(args: &Args, path: &Path, io: IoDriver) -> Result<Device, Failure> {
    let mut options = OpenOptions::new();
    options.read_only(true).io(io).queue_depth(args.depth);
    if let Some(size) = args.l2_cache_size {
        options.l2_cache_bytes(size.0);
    }
    Ok(options.open(path)?)
}

#[cfg(test)]
mod tests {
    //! Guards the names of the thirty tests, by which results of different versions are compared.
    use super::*;

    #[test]
    fn there_are_thirty_tests_by_name() {
        let names: Vec<String> = tests().iter().map(|test| test.name()).collect();
        let mut expected = Vec::new();
        for image in ["qcow2", "zlib", "zstd", "backing_qcow2", "backing_raw"] {
            for queues in ["", "_4_queues"] {
                for access in ["read", "random_read", "read_warm"] {
                    expected.push(format!("{image}_{access}{queues}"));
                }
            }
        }
        assert_eq!(names.len(), 30);
        assert_eq!(names, expected);
    }

    #[test]
    fn tests_are_chosen_by_name() {
        let only = ["zlib_read".to_owned()];
        assert_eq!(chosen(&only).expect("there").len(), 1);
        assert!(chosen(&["zlib_reed".to_owned()]).is_err());
    }
}

//! P12: `urus serve` beside qemu-nbd, by the same clients: `qemu-img bench` and nbdcopy.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use urus::{CacheMode, Format};

use super::super::images::{Kind, Missing};
use super::super::latency::Percentiles;
use super::super::report::{Pair, Slice};
use super::super::writes::in_turn;
use super::super::{qemu, report, slice_time};
use super::report::Measured;
use super::{Bench, Pages, ratio_of};
use crate::failure::Failure;

const BLOCK_BYTES: u64 = 4 << 10;
const DEPTH: u32 = 32;
/// Requests of the client's first run, which tells how many fill a slice.
const FIRST_COUNT: u64 = 2000;
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);

const CONTROL: &str = "qemu-nbd, io_uring";

pub(super) fn random_read(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let pairs = random_reads(bench)?;
    Ok(ratio_of("urus serve", CONTROL, &pairs))
}

pub(super) fn random_read_cpu(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let pairs = random_reads(bench)?;
    Ok(cpu_of(&pairs))
}

pub(super) fn copy(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let pairs = copies(bench)?;
    Ok(ratio_of("urus serve", CONTROL, &pairs))
}

pub(super) fn copy_cpu(bench: &mut Bench<'_>) -> Result<Measured, Missing> {
    let pairs = copies(bench)?;
    Ok(cpu_of(&pairs))
}

fn cpu_of(pairs: &[Pair]) -> Measured {
    let value = report::ratios(pairs, |slice| {
        // A server that took less than the clock can tell took one tick.
        slice.cpu_microseconds().max(10_000.0 / count(slice))
    });
    let control = format!("{CONTROL}; CPU time");
    let mut measured = Measured::with_figures("urus serve".to_owned(), control, pairs, value);
    measured.unit = "ratio";
    measured
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn count(slice: &Slice) -> f64 {
    slice.operations.max(1) as f64
}

/// Of both, once for the two bars that are made of it.
fn random_reads(bench: &mut Bench<'_>) -> Result<Vec<Pair>, Missing> {
    if let Some(pairs) = &bench.nbd_reads {
        return Ok(pairs.clone());
    }
    let path = bench.images.get(Kind::Qcow2)?;
    warm(bench, &path, bench.size)?;
    let servers = Servers::start(&path)?;
    let blocks = bench.size / BLOCK_BYTES;
    let step = qemu::scattered_step(blocks, BLOCK_BYTES) * BLOCK_BYTES;
    let read = |server: &Server, count: u64| {
        let image = format!(
            "driver=nbd,server.type=unix,server.path={}",
            server.socket()
        );
        let text = format!("-d {DEPTH} -s {BLOCK_BYTES} -S {step} --image-opts {image}");
        let arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
        let before = server.cpu_time();
        let slice = qemu::bench(&arguments, count)?;
        Ok::<_, Missing>(Slice {
            cpu: server.cpu_time().saturating_sub(before),
            ..slice
        })
    };
    let first = read(&servers.qemu, FIRST_COUNT)?;
    read(&servers.urus, FIRST_COUNT)?;
    let slice = slice_time(bench.args, super::SECONDS);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive count far below 2^52"
    )]
    let count = ((first.iops * slice.as_secs_f64()) as u64).max(64);
    let urus = || read(&servers.urus, count);
    let qemu = || read(&servers.qemu, count);
    let pairs = in_turn(bench.args.pairs, bench.stop, urus, qemu)?;
    let pairs = pairs.ok_or_else(super::interruption)?;
    bench.nbd_reads = Some(pairs.clone());
    Ok(pairs)
}

fn copies(bench: &mut Bench<'_>) -> Result<Vec<Pair>, Missing> {
    if let Some(pairs) = &bench.nbd_copies {
        return Ok(pairs.clone());
    }
    let [path, _] = bench.written.written_over()?;
    warm(bench, &path, bench.written_size)?;
    let servers = Servers::start(&path)?;
    let urus = || nbdcopy(&servers.urus);
    let qemu = || nbdcopy(&servers.qemu);
    let pairs = in_turn(bench.args.pairs, bench.stop, urus, qemu)?;
    let pairs = pairs.ok_or_else(super::interruption)?;
    bench.nbd_copies = Some(pairs.clone());
    Ok(pairs)
}

fn warm(bench: &mut Bench<'_>, path: &Path, span: u64) -> Result<(), Failure> {
    let image = bench.open(path, Format::Qcow2, CacheMode::Writeback, false)?;
    bench.settle(&[&image], Pages::Large, span)?;
    Ok(image.close()?)
}

/// A copy of everything into nothing.
fn nbdcopy(server: &Server) -> Result<Slice, Missing> {
    let (begin, before) = (Instant::now(), server.cpu_time());
    let output = Command::new("nbdcopy")
        .arg(format!("nbd+unix:///?socket={}", server.socket()))
        .arg("null:")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::Program(format!("nbdcopy cannot be run: {error}")))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("nbdcopy: {}", errors.trim())).into());
    }
    Ok(Slice {
        operations: 1,
        iops: 1.0 / begin.elapsed().as_secs_f64(),
        cpu: server.cpu_time().saturating_sub(before),
        latency: Percentiles::default(),
    })
}

struct Servers {
    urus: Server,
    qemu: Server,
}

impl Servers {
    /// Both on the same image, for reading.
    fn start(path: &Path) -> Result<Self, Missing> {
        let program = std::env::current_exe()
            .map_err(|error| Failure::new(format!("cannot tell where urus lies: {error}")))?;
        Ok(Self {
            urus: Server::start(&program, |command, socket| {
                command
                    .args(["serve", "--read-only", "--nbd"])
                    .arg(format!("unix:{}", socket.display()))
                    .arg(path);
            })?,
            qemu: Server::start(Path::new("qemu-nbd"), |command, socket| {
                command
                    .args(["--read-only", "--persistent", "--shared=0"])
                    .args(["--format=qcow2", "--aio=io_uring", "--cache=writeback"])
                    .arg(format!("--socket={}", socket.display()))
                    .arg(path);
            })?,
        })
    }
}

/// A server in the foreground, killed at the end: it only reads.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(program: &Path, arguments: impl Fn(&mut Command, &Path)) -> Result<Self, Missing> {
        // Of its own: names of sockets must be short, and the images' directory may lie anywhere.
        let dir = tempfile::tempdir()
            .map_err(|error| Failure::new(format!("cannot make a directory: {error}")))?;
        let socket = dir.path().join("nbd.sock");
        let mut command = Command::new(program);
        arguments(&mut command, &socket);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| {
                Missing::Program(format!("{} cannot be run: {error}", program.display()))
            })?;
        let mut server = Self { child, dir };
        let begin = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            let ended = server.child.try_wait().is_ok_and(|status| status.is_some());
            if ended || begin.elapsed() > START {
                return Err(Failure::new(format!(
                    "{} does not listen at {}",
                    program.display(),
                    socket.display()
                ))
                .into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn socket(&self) -> String {
        let path: PathBuf = self.dir.path().join("nbd.sock");
        path.to_string_lossy().into_owned()
    }

    fn cpu_time(&self) -> Duration {
        qemu::process_cpu_time(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Two vhost-user-blk back ends side by side: random reads by libblkio's client, in short alternating slices, and the
//! median of the ratios.
//!
//! `cargo run --release --example compare -- --start URUS IMAGE [DEPTH] [BYTES] [PAIRS]`
//!
//! starts `URUS serve` and qemu-storage-daemon on the qcow2 image, both read-only with one queue, and judges bar P11;
//!
//! `cargo run --release --example compare -- SOCKET PID SOCKET PID [DEPTH] [BYTES] [PAIRS]`
//!
//! compares whatever is at the sockets. Reads are of BYTES bytes (4096), DEPTH at once (32). The images should be warm: with `--start`
//! the image is read first, and the first slices, which are not counted, read at random too. With the processes' numbers it also
//! tells their CPU time per read.

#[path = "../../cli/src/bench/spread.rs"]
mod spread;

use std::error::Error;
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use spread::Spread;

const SLICE: Duration = Duration::from_millis(300);
const WARM_UP: usize = 3;
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);
/// What P11 asks for: the rate, or, where the client is the limit, the CPU time.
const RATE_BAR: f64 = 1.3;
const CPU_BAR: f64 = 0.77;

struct Client {
    queue: Blkioq,
    region: MemoryRegion,
    capacity: u64,
    pid: String,
    random: u64,
    _blkio: Blkio,
}

/// Of one slice.
#[derive(Clone, Copy)]
struct Measure {
    per_second: f64,
    cpu_us: f64,
}

impl Client {
    fn connect(
        socket: &str,
        pid: &str,
        depth: usize,
        bytes: usize,
    ) -> Result<Self, Box<dyn Error>> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", socket)?;
        blkio.set_bool("read-only", true)?;
        blkio.connect()?;
        blkio.set_i32("num-queues", 1)?;
        let capacity = blkio.get_u64("capacity")?;
        let mut started = blkio.start()?;
        let queue = started.queues.pop().ok_or("no queue")?;
        let region = blkio.alloc_mem_region(depth * bytes)?;
        blkio.map_mem_region(&region)?;
        Ok(Self {
            queue,
            region,
            capacity,
            pid: pid.to_owned(),
            random: 0x9e37_79b9_7f4a_7c15,
            _blkio: blkio,
        })
    }

    fn read(&mut self, slot: usize, bytes: usize) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let blocks = self.capacity / bytes as u64;
        let offset = self.random % blocks * bytes as u64;
        let buffer = (self.region.addr + slot * bytes) as *mut u8;
        self.queue
            .read(offset, buffer, bytes, slot, ReqFlags::empty());
    }

    fn slice(&mut self, depth: usize, bytes: usize) -> Result<Measure, Box<dyn Error>> {
        let mut completions: Vec<MaybeUninit<Completion>> = Vec::new();
        completions.resize_with(depth, MaybeUninit::uninit);
        let cpu = cpu_time(&self.pid);
        let begin = Instant::now();
        let mut done = 0_u32;
        for slot in 0..depth {
            self.read(slot, bytes);
        }
        let mut in_flight = depth;
        while in_flight > 0 {
            let count = self.queue.do_io(&mut completions, 1, None, None)?;
            let over = begin.elapsed() >= SLICE;
            for completion in &completions[..count] {
                // SAFETY: `do_io` has filled as many as it says.
                let completion = unsafe { completion.assume_init_ref() };
                if completion.ret != 0 {
                    return Err(format!("a read failed: {}", completion.ret).into());
                }
                done += 1;
                in_flight -= 1;
                if !over {
                    let slot = completion.user_data;
                    self.read(slot, bytes);
                    in_flight += 1;
                }
            }
        }
        let elapsed = begin.elapsed().as_secs_f64();
        let cpu = cpu_time(&self.pid) - cpu;
        Ok(Measure {
            per_second: f64::from(done) / elapsed,
            cpu_us: cpu * 1e6 / f64::from(done),
        })
    }
}

/// Seconds of CPU time that a process has taken.
fn cpu_time(pid: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or("");
    let ticks = after_name.split_whitespace().skip(11).take(2);
    let ticks: f64 = ticks.filter_map(|word| word.parse::<f64>().ok()).sum();
    ticks / 100.0
}

/// A server in the foreground, killed at the end: it only reads.
struct Server {
    child: Child,
    socket: String,
}

impl Server {
    fn start(mut command: Command, socket: String) -> Result<Self, Box<dyn Error>> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("{:?} cannot be run: {error}", command.get_program()))?;
        let mut server = Self { child, socket };
        let begin = Instant::now();
        while !Path::new(&server.socket).exists() {
            if server.child.try_wait()?.is_some() || begin.elapsed() > START {
                return Err(format!("{:?} does not listen", command.get_program()).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `urus serve` and qemu-storage-daemon on one image, for reading.
fn start(urus: &str, image: &str, dir: &Path) -> Result<[Server; 2], Box<dyn Error>> {
    // Into the page cache.
    std::io::copy(&mut std::fs::File::open(image)?, &mut std::io::sink())?;
    let socket = |name: &str| dir.join(name).display().to_string();
    let (urus_socket, qemu_socket) = (socket("urus.sock"), socket("qemu.sock"));
    let mut server = Command::new(urus);
    server.args(["serve", image, "--read-only", "--num-queues", "1"]);
    server.args(["--vhost-user", &urus_socket]);
    let mut daemon = Command::new("qemu-storage-daemon");
    // A comma is the end of a value, unless doubled.
    let file = image.replace(',', ",,");
    daemon
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,filename={file},aio=io_uring,read-only=on"))
        .args(["--blockdev", "driver=qcow2,node-name=d,file=f,read-only=on"])
        .args(["--object", "iothread,id=io", "--export"])
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={qemu_socket},iothread=io,num-queues=1"
        ));
    Ok([
        Server::start(server, urus_socket)?,
        Server::start(daemon, qemu_socket)?,
    ])
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let usage = "compare --start URUS IMAGE | SOCKET PID SOCKET PID, then [DEPTH] [BYTES] [PAIRS]";
    let dir = tempfile::tempdir()?;
    // Held until the end.
    let servers;
    let (ends, numbers): ([String; 4], _) = match words.as_slice() {
        [flag, urus, image, rest @ ..] if flag == "--start" => {
            servers = start(urus, image, dir.path())?;
            let [urus, qemu] = &servers;
            let ends = [
                urus.socket.clone(),
                urus.pid(),
                qemu.socket.clone(),
                qemu.pid(),
            ];
            (ends, rest)
        }
        [first, first_pid, second, second_pid, rest @ ..] => {
            let ends = [first, first_pid, second, second_pid].map(String::clone);
            (ends, rest)
        }
        _ => return Err(usage.into()),
    };
    let number =
        |index: usize, default: usize| numbers.get(index).map_or(Ok(default), |word| word.parse());
    let (depth, bytes, pairs) = (number(0, 32)?, number(1, 4096)?, number(2, 15)?);
    let [first, first_pid, second, second_pid] = &ends;
    let mut one = Client::connect(first, first_pid, depth, bytes)?;
    let mut other = Client::connect(second, second_pid, depth, bytes)?;
    for _ in 0..WARM_UP {
        one.slice(depth, bytes)?;
        other.slice(depth, bytes)?;
    }
    let mut measures = Vec::new();
    for pair in 0..pairs {
        let pair = if pair % 2 == 0 {
            let first = one.slice(depth, bytes)?;
            (first, other.slice(depth, bytes)?)
        } else {
            let second = other.slice(depth, bytes)?;
            (one.slice(depth, bytes)?, second)
        };
        measures.push(pair);
    }
    report(&ends, &measures);
    Ok(())
}

fn report([first, _, second, _]: &[String; 4], measures: &[(Measure, Measure)]) {
    let of = |value: fn(&(Measure, Measure)) -> f64| Spread::of(measures.iter().map(value));
    println!(
        "{first}: {:.0} reads/s, {:.2} us of CPU each",
        of(|pair| pair.0.per_second).median,
        of(|pair| pair.0.cpu_us).median
    );
    println!(
        "{second}: {:.0} reads/s, {:.2} us of CPU each",
        of(|pair| pair.1.per_second).median,
        of(|pair| pair.1.cpu_us).median
    );
    let rate = of(|pair| pair.0.per_second / pair.1.per_second);
    let cpu = of(|pair| pair.0.cpu_us / pair.1.cpu_us);
    let text = |spread: &Spread| {
        format!(
            "{:.2} (min {:.2}, max {:.2}; 95 % {:.2} to {:.2})",
            spread.median, spread.min, spread.max, spread.low, spread.high
        )
    };
    println!(
        "median of {} ratios of reads/s: {}; P11, at least {RATE_BAR}: {}",
        measures.len(),
        text(&rate),
        spread::at_least(RATE_BAR, &rate)
    );
    println!(
        "of CPU: {}; or, where the client is the limit, at most {CPU_BAR}: {}",
        text(&cpu),
        spread::at_most(CPU_BAR, &cpu)
    );
}

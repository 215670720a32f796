//! Two vhost-user-blk back ends side by side: random reads by libblkio's client, in short alternating slices, and the
//! median of the ratios.
//!
//! `cargo run --release --example compare -- SOCKET PID SOCKET PID [DEPTH] [BYTES] [PAIRS]`
//!
//! Reads are of BYTES bytes (4096), DEPTH at once (32). The images should be warm: the first slices, which are not
//! counted, read at random too. With the processes' numbers it also tells their CPU time per read.

use std::error::Error;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

const SLICE: Duration = Duration::from_millis(300);
const WARM_UP: usize = 3;

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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |index: usize, default: usize| words.get(index).map_or(Ok(default), |word| word.parse());
    let (depth, bytes, pairs) = (number(4, 32)?, number(5, 4096)?, number(6, 15)?);
    let [first, first_pid, second, second_pid, ..] = words.as_slice() else {
        return Err("compare SOCKET PID SOCKET PID [DEPTH] [BYTES] [PAIRS]".into());
    };
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
    let of = |value: fn(&(Measure, Measure)) -> f64| median(measures.iter().map(value).collect());
    println!(
        "{first}: {:.0} reads/s, {:.2} us of CPU each",
        of(|pair| pair.0.per_second),
        of(|pair| pair.0.cpu_us)
    );
    println!(
        "{second}: {:.0} reads/s, {:.2} us of CPU each",
        of(|pair| pair.1.per_second),
        of(|pair| pair.1.cpu_us)
    );
    let ratio = of(|pair| pair.0.per_second / pair.1.per_second);
    println!(
        "median of {pairs} ratios: {ratio:.2} (CPU {:.2})",
        of(|pair| pair.0.cpu_us / pair.1.cpu_us)
    );
    Ok(())
}

//! The reserve in earnest, in a process that gets no more memory: small allocations go on, what may fail fails, and once there is memory
//! again nothing is left of it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use urus_ring::{Buffer, ReservingAllocator, hold_reserve, memory_is_short, shortages};

#[global_allocator]
static ALLOCATOR: ReservingAllocator = ReservingAllocator;

/// Bytes of data that this process has.
fn data_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kib = size.and_then(|size| size.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap() << 10
}

#[test]
fn small_allocations_outlive_the_end_of_memory() {
    hold_reserve().unwrap();
    let before = getrlimit(Resource::Data);
    let limit = Rlimit {
        current: Some(data_bytes()),
        maximum: before.maximum,
    };
    setrlimit(Resource::Data, limit).unwrap();
    assert!(Buffer::try_new(16 << 20).is_none());
    assert_eq!(shortages(), 0, "what may fail leaves the reserve alone");
    // Without the reserve, this aborts.
    let mut small: Vec<Box<[u8; 1000]>> = Vec::new();
    while shortages() == 0 {
        assert!(small.len() < 1 << 20, "there is no limit");
        small.push(Box::new([7; 1000]));
    }
    for _ in 0..4000 {
        small.push(Box::new([7; 1000]));
    }
    assert!(memory_is_short() && memory_is_short());
    assert!(small.iter().all(|block| block[..] == [7; 1000]));
    assert!(Buffer::try_new(32 << 20).is_none());
    drop(small);
    setrlimit(Resource::Data, before).unwrap();
    assert!(!memory_is_short());
    assert!(Buffer::try_new(16 << 20).is_some());
    assert_eq!(shortages(), 1);
}

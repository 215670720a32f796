//! Memory registered with a queue is only faster: the same bytes arrive, wherever they lie, and whatever is registered meanwhile.

mod common;

use common::{Bench, DEPTH, next, submit};
use urus_engine::storage::{FileId, Memory, OpKind, Storage};
use urus_ring::{Buffer, DriverKind, RingMemory};

/// What lies in registered memory, partly in it, and outside: the same bytes arrive; and memory that is let go of, or replaced, is
/// not used any more, though operations on it are in flight.
fn registered_memory_is_read_and_written_by(kind: DriverKind) {
    for direct in [false, true] {
        let content: Vec<u8> = (0..64 * 4096_u32)
            .map(|at| (at / 7).to_le_bytes()[0])
            .collect();
        let mut bench = Bench::with(kind, DEPTH, direct, &content);
        let (buffers, region) = Buffer::pool(4, 16_384);
        bench.driver.register_memory(vec![region]).unwrap();
        let outside = Buffer::new(16_384).into_memory();
        let mut pool: Vec<_> = buffers.into_iter().map(Buffer::into_memory).collect();
        for round in 0..3 {
            for (slot, memory) in pool.iter().chain([&outside]).enumerate() {
                let offset = slot as u64 * 8192;
                let memory = memory.slice(4096, 8192);
                submit(
                    &mut bench.driver,
                    FileId(0),
                    OpKind::Read { offset, memory },
                    slot,
                );
            }
            if round == 1 {
                // While they are in flight.
                bench.driver.kick();
                let (_, other) = Buffer::pool(1, 4096);
                bench.driver.register_memory(vec![other]).unwrap();
            }
            for _ in 0..5 {
                assert_eq!(next(&mut bench.driver).result.unwrap(), 8192);
            }
            for (slot, memory) in pool.iter().chain([&outside]).enumerate() {
                let mut bytes = vec![0; 8192];
                memory.read(4096, &mut bytes);
                assert!(
                    bytes == content[slot * 8192..][..8192],
                    "round {round}, slot {slot}"
                );
                memory.zero(4096, 8192);
            }
        }
        bench.driver.register_memory(Vec::new()).unwrap();
        // Several pieces, of which some are registered.
        let (buffers, region) = Buffer::pool(2, 4096);
        bench.driver.register_memory(vec![region]).unwrap();
        let parts: Vec<_> = buffers.into_iter().map(Buffer::into_memory).collect();
        for (value, part) in [5, 6].into_iter().zip(&parts) {
            part.write(0, &[value; 4096]);
        }
        let memory = RingMemory::chain(vec![
            parts[1].clone(),
            outside.slice(0, 4096),
            parts[0].clone(),
        ]);
        for (offset, memory) in [(0, memory), (20_480, parts[1].clone())] {
            let kind = OpKind::Write {
                offset,
                memory,
                sync: offset != 0,
            };
            bench.run(kind).unwrap();
        }
        pool.clear();
        let written = bench.content();
        assert!(written[..4096] == [6; 4096] && written[4096..8192] == [0; 4096]);
        assert!(written[8192..12_288] == [5; 4096] && written[20_480..24_576] == [6; 4096]);
        assert!(written[24_576..] == content[24_576..]);
    }
}

#[test]
fn registered_memory_is_read_and_written() {
    registered_memory_is_read_and_written_by(DriverKind::IoUring);
}

#[test]
fn blocking_calls_take_registered_memory_as_any_other() {
    registered_memory_is_read_and_written_by(DriverKind::Blocking);
}

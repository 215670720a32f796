//! Guards what a guest's request is taken for: however it is cut, and whatever nonsense it is.

use super::*;
use crate::chain::Range;
use crate::testing::{DATA, END, memory};

const DISK: Disk = Disk {
    read_only: false,
    serial: *b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
};

/// What comes of a request with this header, payload and room, each cut as told.
struct Asked {
    result: Result<Request, NoStatus>,
    chain: Chain,
    clears: Vec<Clear>,
}

const STATUS: u64 = DATA + 0x8000;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// `bytes` are what the device reads, in pieces of `cut` bytes; then `writable`.
fn ask(disk: &Disk, bytes: &[u8], cut: usize, writable: &[(u64, usize)]) -> Asked {
    let memory = memory();
    let mut chain = Chain::default();
    for (index, piece) in (0..).zip(bytes.chunks(cut)) {
        // Not adjacent, and not in order.
        let at = GuestAddress(DATA + 0x4000 - index * 0x40);
        memory.write_slice(piece, at).unwrap();
        chain.readable.push((at, piece.len()));
    }
    chain.writable = writable
        .iter()
        .map(|&(at, len)| (GuestAddress(at), len))
        .collect();
    let mut clears = Vec::new();
    let result = parse(&memory, &mut chain, disk, &mut clears);
    Asked {
        result,
        chain,
        clears,
    }
}

fn kind(asked: &Asked) -> Kind {
    asked.result.unwrap().kind
}

const FAILED: Kind = Kind::Ended {
    status: Status::IoError,
    written: 0,
};
const UNSUPPORTED: Kind = Kind::Ended {
    status: Status::Unsupported,
    written: 0,
};
const DONE: [(u64, usize); 1] = [(STATUS, 1)];

#[test]
fn reads_and_writes_however_they_are_cut() {
    for cut in [1, 5, 16, 17, 4096] {
        let asked = ask(
            &DISK,
            &header(0, 3),
            cut,
            &[(DATA, 512), (DATA + 0x1000, 513)],
        );
        assert_eq!(kind(&asked), Kind::Read { offset: 1536 });
        let data: Vec<Range> = vec![
            (GuestAddress(DATA), 512),
            (GuestAddress(DATA + 0x1000), 512),
        ];
        assert_eq!(asked.chain.writable, data);
        assert_eq!(
            asked.result.unwrap().status_at,
            GuestAddress(DATA + 0x1000 + 512)
        );

        let mut bytes = header(1, 8);
        bytes.extend([7; 1024]);
        let asked = ask(&DISK, &bytes, cut, &DONE);
        assert_eq!(kind(&asked), Kind::Write { offset: 4096 });
        assert_eq!(total(&asked.chain.readable), 1024);
        assert!(asked.chain.writable.is_empty());
    }
    assert_eq!(kind(&ask(&DISK, &header(4, 0), 16, &DONE)), Kind::Flush);
}

#[test]
fn nonsense_fails() {
    let with_data = |mut bytes: Vec<u8>, count| {
        bytes.resize(bytes.len() + count, 0);
        bytes
    };
    for (what, bytes, writable, expected) in [
        ("no header", vec![], vec![(STATUS, 1)], FAILED),
        (
            "half a header",
            header(0, 0)[..15].to_vec(),
            vec![(STATUS, 1)],
            FAILED,
        ),
        ("unknown", header(99, 0), vec![(STATUS, 1)], UNSUPPORTED),
        ("zone report", header(16, 0), vec![(STATUS, 1)], UNSUPPORTED),
        (
            "odd read",
            header(0, 0),
            vec![(DATA, 511), (STATUS, 1)],
            FAILED,
        ),
        (
            "odd write",
            with_data(header(1, 0), 513),
            vec![(STATUS, 1)],
            FAILED,
        ),
        (
            "read of what is to be written",
            with_data(header(0, 0), 512),
            vec![(STATUS, 1)],
            FAILED,
        ),
        (
            "write with room",
            header(1, 0),
            vec![(DATA, 512), (STATUS, 1)],
            FAILED,
        ),
        (
            "sector overflow",
            header(0, u64::MAX / 512 + 1),
            vec![(DATA, 512), (STATUS, 1)],
            FAILED,
        ),
        (
            "end overflow",
            header(0, u64::MAX / 512),
            vec![(DATA, 1024), (STATUS, 1)],
            FAILED,
        ),
        (
            "discard of nothing",
            header(11, 0),
            vec![(STATUS, 1)],
            FAILED,
        ),
        (
            "half a segment",
            with_data(header(11, 0), 24),
            vec![(STATUS, 1)],
            FAILED,
        ),
        (
            "too many segments",
            with_data(header(13, 0), 33 * 16),
            vec![(STATUS, 1)],
            FAILED,
        ),
        (
            "serial outside",
            header(8, 0),
            vec![(END - 10, 20), (STATUS, 1)],
            FAILED,
        ),
    ] {
        assert_eq!(kind(&ask(&DISK, &bytes, 16, &writable)), expected, "{what}");
    }
}

#[test]
fn a_request_needs_a_place_for_its_status() {
    for writable in [
        vec![],
        vec![(END, 1)],
        vec![(END - 1, 2)],
        vec![(u64::MAX, 1)],
        vec![(DATA, 4), (u64::MAX, 2)],
    ] {
        assert_eq!(
            ask(&DISK, &header(0, 0), 16, &writable).result,
            Err(NoStatus),
            "{writable:x?}"
        );
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = Disk {
        read_only: true,
        ..DISK
    };
    for kind_code in [1, 11, 13] {
        let mut bytes = header(kind_code, 0);
        bytes.resize(16 + 512, 0);
        assert_eq!(kind(&ask(&disk, &bytes, 16, &DONE)), FAILED);
    }
    let read = ask(&disk, &header(0, 0), 16, &[(DATA, 512), (STATUS, 1)]);
    assert_eq!(kind(&read), Kind::Read { offset: 0 });
}

#[test]
fn segments_of_discards_and_zeroes() {
    let clear = |kind_code, segments: &[(u64, u32, u32)], cut| {
        let mut bytes = header(kind_code, 0);
        for (sector, sectors, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        ask(&DISK, &bytes, cut, &DONE)
    };
    for cut in [3, 16, 4096] {
        let asked = clear(13, &[(2, 4, 1), (100, 0, 0)], cut);
        assert_eq!(kind(&asked), Kind::WriteZeroes);
        let parts = [
            Clear {
                offset: 1024,
                len: 2048,
                unmap: true,
            },
            Clear {
                offset: 51_200,
                len: 0,
                unmap: false,
            },
        ];
        assert_eq!(asked.clears, parts);
        assert_eq!(kind(&clear(11, &[(0, 8 << 20, 0)], cut)), Kind::Discard);
    }
    assert_eq!(
        kind(&clear(11, &[(0, 1, 1)], 16)),
        UNSUPPORTED,
        "a discard does not unmap"
    );
    assert_eq!(
        kind(&clear(13, &[(0, 1, 2)], 16)),
        UNSUPPORTED,
        "an unknown flag"
    );
    assert_eq!(
        kind(&clear(13, &[(0, (8 << 20) + 1, 0)], 16)),
        FAILED,
        "too long"
    );
    assert_eq!(
        kind(&clear(11, &[(u64::MAX, 1, 0)], 16)),
        FAILED,
        "beyond everything"
    );
}

#[test]
fn the_serial_number_fills_what_it_gets() {
    let memory = memory();
    for (room, written) in [(20, 20), (7, 7), (40, 20)] {
        let mut chain = Chain::default();
        memory
            .write_slice(&header(8, 0), GuestAddress(DATA))
            .unwrap();
        memory
            .write_slice(&[0xff; 64], GuestAddress(STATUS - 64))
            .unwrap();
        chain.readable.push((GuestAddress(DATA), 16));
        chain.writable.push((GuestAddress(STATUS - 64), 4));
        chain
            .writable
            .push((GuestAddress(STATUS - 60), room - 4 + 1));
        let request = parse(&memory, &mut chain, &DISK, &mut Vec::new()).unwrap();
        assert_eq!(
            request.kind,
            Kind::Ended {
                status: Status::Ok,
                written
            }
        );
        let mut bytes = vec![0; room];
        memory
            .read_slice(&mut bytes, GuestAddress(STATUS - 64))
            .unwrap();
        assert_eq!(bytes[..written], DISK.serial[..written]);
        assert!(bytes[written..].iter().all(|&byte| byte == 0xff));
    }
}

//! virtio-blk requests (virtio 1.2, 5.2.6 "Device Operation"): what a descriptor chain asks for.
//!
//! How the guest cuts a request into descriptors means nothing: the header is the first 16 bytes that the device
//! reads, the status is the last byte that it writes, and the data is what is left.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::chain::{Chain, total};
use crate::limits::{CLEAR_SECTORS, CLEAR_SEGMENTS, SERIAL_BYTES};

/// The unit in which requests count, whatever the block size is said to be.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// How a request ended, as its status byte says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) fn byte(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(code).expect("a status is a byte")
    }
}

/// What of a device requests are judged by.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) read_only: bool,
    /// Padded with zeroes.
    pub(crate) serial: [u8; SERIAL_BYTES],
}

/// A part of a discard or write-zeroes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Clear {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) unmap: bool,
}

/// What is asked for. Offsets are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Into what is left of the chain's writable ranges.
    Read {
        offset: u64,
    },
    /// From what is left of its readable ranges.
    Write {
        offset: u64,
    },
    Flush,
    Discard,
    WriteZeroes,
    /// Nothing is left to do: so it ended, with as many bytes written before the status.
    Ended {
        status: Status,
        written: usize,
    },
}

/// A request, as far as it was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    /// Where its status goes: a byte of the guest's memory.
    pub(crate) status_at: GuestAddress,
}

/// There is no place for a status, so that nobody can be told that this fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request without a status byte in the guest's memory")]
pub(crate) struct NoStatus;

/// Understands a chain, and leaves only its data in it. The parts of discards and write-zeroes go to `clears`.
pub(crate) fn parse(
    memory: &GuestMemoryMmap,
    chain: &mut Chain,
    disk: &Disk,
    clears: &mut Vec<Clear>,
) -> Result<Request, NoStatus> {
    clears.clear();
    let status_at = chain.take_last_writable().ok_or(NoStatus)?;
    if !memory.address_in_range(status_at) {
        return Err(NoStatus);
    }
    let kind = understand(memory, chain, disk, clears)
        .unwrap_or_else(|status| Kind::Ended { status, written: 0 });
    Ok(Request { kind, status_at })
}

fn understand(
    memory: &GuestMemoryMmap,
    chain: &mut Chain,
    disk: &Disk,
    clears: &mut Vec<Clear>,
) -> Result<Kind, Status> {
    let mut header = [0; 16];
    if !chain.take_front(memory, &mut header) {
        return Err(Status::IoError);
    }
    let [kind, sector] = [field::<4>(&header, 0), field::<8>(&header, 8)];
    match u32::try_from(kind).expect("four bytes") {
        VIRTIO_BLK_T_IN => {
            let offset = data_offset(sector, total(&chain.writable))?;
            nothing(&chain.readable)?;
            Ok(Kind::Read { offset })
        }
        VIRTIO_BLK_T_OUT => {
            may_write(disk)?;
            let offset = data_offset(sector, total(&chain.readable))?;
            nothing(&chain.writable)?;
            Ok(Kind::Write { offset })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
        VIRTIO_BLK_T_DISCARD => {
            may_write(disk)?;
            read_clears(memory, chain, false, clears)?;
            Ok(Kind::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            may_write(disk)?;
            read_clears(memory, chain, true, clears)?;
            Ok(Kind::WriteZeroes)
        }
        VIRTIO_BLK_T_GET_ID => {
            let written = write_serial(memory, chain, disk)?;
            Ok(Kind::Ended {
                status: Status::Ok,
                written,
            })
        }
        _ => Err(Status::Unsupported),
    }
}

/// A little-endian number of `N` bytes.
fn field<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(wide)
}

fn may_write(disk: &Disk) -> Result<(), Status> {
    if disk.read_only {
        Err(Status::IoError)
    } else {
        Ok(())
    }
}

/// Data in the wrong direction.
fn nothing(ranges: &[crate::chain::Range]) -> Result<(), Status> {
    if ranges.is_empty() {
        Ok(())
    } else {
        Err(Status::IoError)
    }
}

/// Where data of whole sectors goes. Whether that is within the disk the engine says, when it gets there.
fn data_offset(sector: u64, len: usize) -> Result<u64, Status> {
    let whole = (len as u64).is_multiple_of(SECTOR_BYTES);
    sector
        .checked_mul(SECTOR_BYTES)
        .filter(|offset| whole && offset.checked_add(len as u64).is_some())
        .ok_or(Status::IoError)
}

/// Bytes of a segment: sector, sectors, flags.
const CLEAR_BYTES: usize = 16;

fn read_clears(
    memory: &GuestMemoryMmap,
    chain: &mut Chain,
    may_unmap: bool,
    clears: &mut Vec<Clear>,
) -> Result<(), Status> {
    nothing(&chain.writable)?;
    let bytes = total(&chain.readable);
    let segments = bytes / CLEAR_BYTES;
    if bytes == 0 || !bytes.is_multiple_of(CLEAR_BYTES) || segments > CLEAR_SEGMENTS as usize {
        return Err(Status::IoError);
    }
    for _ in 0..segments {
        let mut segment = [0; CLEAR_BYTES];
        if !chain.take_front(memory, &mut segment) {
            return Err(Status::IoError);
        }
        let (sector, sectors, flags) = (
            field::<8>(&segment, 0),
            field::<4>(&segment, 8),
            field::<4>(&segment, 12),
        );
        let unmap = flags & u64::from(VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) != 0;
        let known = if may_unmap { u64::from(unmap) } else { 0 };
        if flags != known {
            return Err(Status::Unsupported);
        }
        if sectors > CLEAR_SECTORS.into() {
            return Err(Status::IoError);
        }
        let len = sectors * SECTOR_BYTES;
        let offset = sector
            .checked_mul(SECTOR_BYTES)
            .filter(|offset| offset.checked_add(len).is_some())
            .ok_or(Status::IoError)?;
        clears.push(Clear { offset, len, unmap });
    }
    Ok(())
}

fn write_serial(memory: &GuestMemoryMmap, chain: &Chain, disk: &Disk) -> Result<usize, Status> {
    let mut written = 0;
    for &(address, len) in &chain.writable {
        let part = &disk.serial[written..];
        let part = &part[..part.len().min(len)];
        memory
            .write_slice(part, address)
            .map_err(|_| Status::IoError)?;
        written += part.len();
    }
    Ok(written)
}

#[cfg(test)]
mod tests;

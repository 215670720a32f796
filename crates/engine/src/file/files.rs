//! One thread's way to the files of a device.

use std::io;

use super::hooks::Transform;
use super::transfer::{Direction, Ends, Next, Transfer, is_transient};
use crate::errno::{EDQUOT, EIO, ENOSPC};
use crate::error::{Error, Result};
use crate::limits;
use crate::planted::{self, Bug};
use crate::reactor::Reactor;
use crate::seen::{Way, note};
use crate::storage::{FileId, FileProperties, Memory, Op, OpKind, Storage};
use crate::sync::Arc;
use crate::to_usize;

/// A file as transfers see it.
pub(crate) struct Facts {
    /// For errors.
    pub(crate) name: String,
    pub(crate) transform: Option<Arc<dyn Transform>>,
}

/// What an operation has to be a multiple of to go out as it is.
#[derive(Clone, Copy)]
struct Alignment {
    /// Offset and length.
    place: u64,
    memory: usize,
}

impl Alignment {
    /// Of a file whose data goes out changed: no operation is a multiple of this.
    const NEVER: Self = Self {
        place: u64::MAX,
        memory: 1,
    };
}

/// The files of a device, for one thread. `D` describes operations that need no task.
pub(crate) struct Files<S: Storage, D> {
    pub(crate) reactor: Reactor<S, D>,
    /// By file, as all that follows.
    facts: Box<[Facts]>,
    /// Of data as the guest has it.
    plain: Box<[Alignment]>,
}

/// `len` zeroed bytes for a table or a cluster of the image, whose length the image decides.
pub(crate) fn zeroed(len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(to_usize(len));
    reserved.map_err(|_| Error::OutOfMemory { bytes: len })?;
    bytes.resize(to_usize(len), 0);
    Ok(bytes)
}

/// Copies from `source` at `start` into all of `target`, where the shorter ends it.
pub(crate) fn copy<M: Memory>(source: &M, start: usize, target: &M) {
    let total = target.len().min(source.len() - start);
    in_pieces(total, |done, buffer| {
        source.read(start + done, buffer);
        target.write(done, buffer);
    });
}

/// Goes through `total` bytes in pieces of whole units, with a buffer for each.
fn in_pieces(total: usize, mut each: impl FnMut(usize, &mut [u8])) {
    let mut buffer = [0; 16 << 10];
    let mut done = 0;
    while done < total {
        let step = buffer.len().min(total - done);
        each(done, &mut buffer[..step]);
        done += step;
    }
}

impl<S: Storage, D> Files<S, D> {
    /// The facts stand in the order of the files' numbers.
    pub(crate) fn new(storage: S, facts: Vec<Facts>) -> Self {
        let plain = facts.iter().zip(0..).map(|(facts, file)| {
            let properties = storage.properties(FileId(file));
            match facts.transform {
                Some(_) => Alignment::NEVER,
                None => Alignment {
                    place: u64::from(properties.alignment),
                    memory: to_usize(u64::from(properties.memory_alignment)),
                },
            }
        });
        Self {
            plain: plain.collect(),
            facts: facts.into_boxed_slice(),
            reactor: Reactor::new(storage),
        }
    }

    pub(crate) fn properties(&self, file: FileId) -> FileProperties {
        self.reactor.properties(file)
    }

    /// Memory of our own, aligned for every file.
    pub(crate) fn allocate(&self, bytes: u64) -> Result<S::Memory> {
        self.reactor.allocate(bytes)
    }

    /// Whether data may go out as it is, by one operation: not changed, and aligned as direct I/O needs it.
    #[inline]
    pub(crate) fn is_plain(&self, file: FileId, offset: u64, memory: &S::Memory) -> bool {
        let Alignment { place, memory: own } = self.plain[usize::from(file.0)];
        place == 1
            || (offset.is_multiple_of(place)
                && (memory.len() as u64).is_multiple_of(place)
                && memory.is_aligned(own))
    }

    /// What a write of data has to be a multiple of, or what stands around it is read and written with it (O18).
    pub(crate) fn data_unit(&self, file: FileId) -> u64 {
        let alignment = u64::from(self.properties(file).alignment);
        match self.facts[usize::from(file.0)].transform {
            Some(_) => alignment.max(<dyn Transform>::UNIT_BYTES),
            None => alignment,
        }
    }

    /// Whether zeroes in the file are zeroes of the data.
    pub(crate) fn keeps_zeroes(&self, file: FileId) -> bool {
        self.facts[usize::from(file.0)].transform.is_none() || planted::is(Bug::ZeroesPastCipher)
    }

    /// Reads all of `memory`, as the file has it; what lies past its end reads as zeroes.
    pub(crate) async fn read(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let properties = self.properties(file);
        let align = u64::from(properties.alignment);
        let end = offset + memory.len() as u64;
        let memory_align = to_usize(u64::from(properties.memory_alignment));
        if offset.is_multiple_of(align)
            && end.is_multiple_of(align)
            && memory.is_aligned(memory_align)
        {
            return self.transfer(Direction::Read, file, offset, memory).await;
        }
        // O_DIRECT: through memory of our own, widened to whole blocks.
        let start = offset - offset % align;
        let bounce = self.allocate(end.next_multiple_of(align) - start)?;
        self.transfer(Direction::Read, file, start, bounce.clone())
            .await?;
        copy(&bounce, to_usize(offset - start), &memory);
        Ok(())
    }

    /// Writes all of `memory`, as it is. Offset and length obey the file's alignment.
    pub(crate) async fn write(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let memory_align = to_usize(u64::from(self.properties(file).memory_alignment));
        let memory = if memory.is_aligned(memory_align) {
            memory
        } else {
            let bounce = self.allocate(memory.len() as u64)?;
            copy(&memory, 0, &bounce);
            bounce
        };
        self.transfer(Direction::Write, file, offset, memory).await
    }

    /// Reads a guest's data.
    pub(crate) async fn read_data(
        &self,
        file: FileId,
        offset: u64,
        memory: S::Memory,
    ) -> Result<()> {
        let Some(transform) = &self.facts[usize::from(file.0)].transform else {
            return self.read(file, offset, memory).await;
        };
        // Through memory of our own: a guest never sees what the file has.
        let unit = self.data_unit(file);
        let start = offset - offset % unit;
        let end = (offset + memory.len() as u64).next_multiple_of(unit);
        let whole = self.allocate(end - start)?;
        self.read(file, start, whole.clone()).await?;
        in_pieces(whole.len(), |done, buffer| {
            whole.read(done, buffer);
            transform.after_read(start + done as u64, buffer);
            whole.write(done, buffer);
        });
        copy(&whole, to_usize(offset - start), &memory);
        Ok(())
    }

    /// Writes a guest's data, at any offset: what is no whole unit is read, changed and written as whole ones. Two of those that share a
    /// unit exclude one another (O18), which is the caller's.
    pub(crate) async fn write_data(
        &self,
        file: FileId,
        offset: u64,
        memory: S::Memory,
    ) -> Result<()> {
        let unit = self.data_unit(file);
        let end = offset + memory.len() as u64;
        if offset.is_multiple_of(unit) && end.is_multiple_of(unit) {
            return self.write_units(file, offset, memory).await;
        }
        let start = offset - offset % unit;
        let units = self.allocate(end.next_multiple_of(unit) - start)?;
        self.read_data(file, start, units.clone()).await?;
        let within = to_usize(offset - start);
        copy(&memory, 0, &units.slice(within, memory.len()));
        self.write_units(file, start, units).await
    }

    async fn write_units(&self, file: FileId, offset: u64, memory: S::Memory) -> Result<()> {
        let Some(transform) = &self.facts[usize::from(file.0)].transform else {
            return self.write(file, offset, memory).await;
        };
        let changed = self.allocate(memory.len() as u64)?;
        in_pieces(memory.len(), |done, buffer| {
            memory.read(done, buffer);
            transform.before_write(offset + done as u64, buffer);
            changed.write(done, buffer);
        });
        self.write(file, offset, changed).await
    }

    async fn transfer(
        &self,
        direction: Direction,
        file: FileId,
        offset: u64,
        memory: S::Memory,
    ) -> Result<()> {
        if memory.is_empty() {
            return Ok(());
        }
        let mut transfer = Transfer::new(direction, file, offset, memory);
        loop {
            let result = self.reactor.run(transfer.op()).await;
            if transfer.is_whole(&result) {
                return Ok(());
            }
            match transfer.not_whole(result, self) {
                Next::Over => return Ok(()),
                Next::Again => {}
                Next::Failed(error) => return Err(self.failed(&transfer, &error)),
            }
        }
    }

    /// Why a transfer failed.
    pub(crate) fn failed(&self, transfer: &Transfer<S::Memory>, error: &io::Error) -> Error {
        let left = transfer.memory.len() as u64;
        self.error(transfer.name(), transfer.file, transfer.offset, left, error)
    }

    /// Writes bytes of metadata.
    pub(crate) async fn write_bytes(&self, file: FileId, offset: u64, bytes: &[u8]) -> Result<()> {
        let memory = self.allocate(bytes.len() as u64)?;
        memory.write(0, bytes);
        self.write(file, offset, memory).await
    }

    /// Reads bytes of metadata.
    pub(crate) async fn read_bytes(&self, file: FileId, offset: u64, len: u64) -> Result<Vec<u8>> {
        let memory = self.allocate(len)?;
        self.read(file, offset, memory.clone()).await?;
        let mut bytes = zeroed(len)?;
        memory.read(0, &mut bytes);
        Ok(bytes)
    }

    /// Runs an operation without data, and again where it was interrupted.
    pub(crate) async fn simple(
        &self,
        operation: &'static str,
        file: FileId,
        offset: u64,
        bytes: u64,
        kind: impl Fn() -> OpKind<S::Memory>,
    ) -> Result<()> {
        let mut retries = 0;
        loop {
            let kind = kind();
            match self.reactor.run(Op { file, kind }).await {
                Ok(_) => return Ok(()),
                Err(error) if is_transient(&error) && retries < limits::RETRIES => retries += 1,
                Err(error) => return Err(self.error(operation, file, offset, bytes, &error)),
            }
        }
    }

    /// fdatasync, once: what one that failed has covered is not known, so nobody tries again.
    pub(crate) async fn sync(&self, file: FileId) -> io::Result<usize> {
        let kind = OpKind::SyncData;
        self.reactor.run(Op { file, kind }).await
    }

    /// The length of a file in bytes, now.
    pub(crate) fn length(&self, file: FileId) -> Result<u64> {
        self.reactor
            .with_storage(|storage| storage.file_len(file))
            .map_err(|error| self.error("find the length", file, 0, 0, &error))
    }

    /// What the operating system says of an operation, with what and where it was.
    pub(crate) fn error(
        &self,
        operation: &'static str,
        file: FileId,
        offset: u64,
        bytes: u64,
        error: &io::Error,
    ) -> Error {
        let file = self.facts[usize::from(file.0)].name.clone();
        match error.raw_os_error() {
            Some(ENOSPC | EDQUOT) => Error::OutOfSpace {
                operation,
                file,
                offset,
            },
            errno => Error::Io {
                operation,
                file,
                offset,
                bytes,
                errno: errno.unwrap_or(EIO),
            },
        }
    }
}

impl<S: Storage, D> Ends for Files<S, D> {
    fn is_past_end(&self, file: FileId, offset: u64) -> bool {
        let length = self.reactor.with_storage(|storage| storage.file_len(file));
        let past = length.is_ok_and(|bytes| bytes <= offset);
        note(Way::OddEnd, || {
            past && !offset.is_multiple_of(limits::SECTOR_BYTES)
        });
        past
    }

    fn resume_unit(&self, file: FileId) -> u64 {
        u64::from(self.properties(file).alignment).max(limits::SECTOR_BYTES)
    }
}

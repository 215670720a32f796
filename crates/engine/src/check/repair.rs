//! Makes refcounts and COPIED flags right.
//!
//! The order keeps the image no worse than it was, wherever the repair is cut off:
//!
//! 1. COPIED is cleared where the refcount will not be 1. A clear flag is never wrong (O10), and must be durable
//!    before a refcount rises.
//! 2. Refcounts that are too low rise; new refcount structures are written where nothing refers to yet (O1, O8).
//! 3. The header is switched to them, in one write inside one sector (O8).
//! 4. Refcounts that are too high fall, those of the old structures among them (O6).
//! 5. COPIED is set where the refcount, now durable, is 1.
//! 6. The caller checks again, and clears the dirty and the corrupt bit where all is well (O12).
//!
//! There is a barrier between each two.

use urus_format::{Header, HeaderChange, HostOffset, autoclear, incompatible, refcount};

use super::counts::CHUNK_CLUSTERS;
use super::entries::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use super::relocate::Relocation;
use super::walk::Walked;
use super::{CheckIo, READ_BYTES, SECTOR_BYTES};
use crate::error::Result;
use crate::header;
use crate::planted::{self, Bug};
use crate::to_usize;

/// What a repair has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mended {
    /// COPIED flags changed.
    pub(super) copied_changed: u64,
    /// Anything was written.
    pub(super) wrote: bool,
}

/// Which refcounts a pass over the refcount blocks changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Raise,
    Lower,
}

/// What a pass over the COPIED flags does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flags {
    /// Clears those that the repaired refcounts do not allow.
    Clear,
    /// Makes all agree with the refcounts on disk.
    Settle,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    L1,
    L2,
}

/// Repairs what was found; `all` or only leaks.
///
/// # Errors
/// Reads, writes and barriers that fail.
pub(super) async fn repair<I: CheckIo>(
    io: &I,
    header: &mut Header,
    walked: &mut Walked,
    all: bool,
) -> Result<Mended> {
    let relocation = match all.then(|| Relocation::plan(walked, header)).transpose() {
        Ok(relocation) => relocation.flatten(),
        Err(text) => {
            walked
                .report
                .note(|| format!("nothing was repaired: {text}"));
            return Ok(Mended::default());
        }
    };
    let leaks = walked.report.leaks + walked.report.leaks_past_end > 0;
    if leaks && walked.lost {
        walked.report.note(|| {
            "no cluster is freed, because it may be one of those that can no longer be found".into()
        });
    }
    // A refcount table or block that could not be counted lies in clusters that look free. New ones come first.
    let whole = walked.refcounts.is_counted();
    if leaks && !walked.lost && !whole {
        walked.report.note(|| {
            "no cluster is freed, because it may be one of the broken refcount structures; a repair of everything makes new ones".into()
        });
    }
    let lower = (leaks || relocation.is_some()) && whole && !walked.lost;
    let raise = all && (walked.too_low > 0 || relocation.is_some());
    let flags = all && (raise || lower || walked.report.corruptions > 0);
    if !(lower || raise || flags) {
        return Ok(Mended::default());
    }

    let mut mender = Mender {
        io,
        walked,
        changed: false,
        mended: Mended::default(),
    };
    mender.drop_unknown_autoclear(header).await?;
    if flags {
        mender.copied_flags(header, Flags::Clear).await?;
        mender.barrier().await?;
    }
    if let Some(relocation) = &relocation {
        mender.write_relocation(relocation).await?;
    }
    if raise {
        mender.refcounts(Pass::Raise).await?;
        mender.barrier().await?;
    }
    if let Some(relocation) = &relocation {
        mender.switch(header, relocation).await?;
    }
    if lower {
        mender.refcounts(Pass::Lower).await?;
        mender.barrier().await?;
    }
    if flags {
        mender.walked.read_singles(io).await;
        if !mender.walked.incomplete {
            mender.copied_flags(header, Flags::Settle).await?;
            mender.barrier().await?;
        }
    }
    Ok(mender.mended)
}

/// O29: what whoever had the image before has written can be read, and need not be durable. Before anything is written that rests on it, it
/// is.
///
/// # Errors
/// A barrier that fails.
pub(super) async fn trust<I: CheckIo>(io: &I) -> Result<()> {
    if planted::is(Bug::TrustsThePageCache) {
        return Ok(());
    }
    io.barrier().await
}

/// Clears the dirty and the corrupt bit, durably.
///
/// # Errors
/// Reads, writes and barriers that fail; `header` is as it was then.
pub(super) async fn clear_bits<I: CheckIo>(io: &I, header: &mut Header) -> Result<()> {
    let bits = header.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT);
    change_header(io, header, HeaderChange::Incompatible(bits)).await
}

/// Changes a field of the header, durably, in one write of its first sector; everything else in it
/// stays as it is (O28).
///
/// # Errors
/// Reads, writes and barriers that fail; `header` is as it was then.
async fn change_header<I: CheckIo>(
    io: &I,
    header: &mut Header,
    change: HeaderChange,
) -> Result<()> {
    let before = io.read(0, SECTOR_BYTES as u64).await?;
    let (after, changed) = header::patch(io.name(), header, &[change], &before)?;
    io.write(0, &after).await?;
    io.barrier().await?;
    *header = changed;
    Ok(())
}

/// A repair under way.
struct Mender<'a, I> {
    io: &'a I,
    walked: &'a mut Walked,
    /// Something was written since the last barrier.
    changed: bool,
    mended: Mended,
}

impl<I: CheckIo> Mender<'_, I> {
    async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.begin().await?;
        self.changed = true;
        self.io.write(offset, bytes).await
    }

    /// Something is about to be written.
    async fn begin(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.mended.wrote, true) {
            trust(self.io).await?;
        }
        Ok(())
    }

    async fn barrier(&mut self) -> Result<()> {
        if std::mem::take(&mut self.changed) {
            self.io.barrier().await?;
        }
        Ok(())
    }

    /// Writes the sectors that differ.
    async fn write_changed(&mut self, offset: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let differs = |at: usize| {
            let end = (at + SECTOR_BYTES).min(new.len());
            old[at..end] != new[at..end]
        };
        let mut at = 0;
        while at < new.len() {
            let start = at;
            while at < new.len() && differs(at) {
                at += SECTOR_BYTES;
            }
            if at > start {
                let end = at.min(new.len());
                self.write(offset + start as u64, &new[start..end]).await?;
            } else {
                at += SECTOR_BYTES;
            }
        }
        Ok(())
    }

    /// Whoever changes an image clears the autoclear bits that it does not know, and first.
    async fn drop_unknown_autoclear(&mut self, header: &mut Header) -> Result<()> {
        let known = header.autoclear & autoclear::KNOWN;
        if known != header.autoclear {
            self.begin().await?;
            change_header(self.io, header, HeaderChange::Autoclear(known)).await?;
        }
        Ok(())
    }

    async fn write_relocation(&mut self, relocation: &Relocation) -> Result<()> {
        for (offset, index) in relocation.places(self.walked) {
            let bytes = relocation.encode(self.walked, index);
            self.write(offset, &bytes).await?;
        }
        Ok(())
    }

    /// O8: from the old refcount structures to the new ones, at once.
    async fn switch(&mut self, header: &mut Header, relocation: &Relocation) -> Result<()> {
        let table = HostOffset(relocation.table << self.walked.geometry.cluster_bits());
        let clusters =
            u32::try_from(relocation.table_clusters).expect("a refcount table has at most 8 MiB");
        change_header(
            self.io,
            header,
            HeaderChange::RefcountTable(table, clusters),
        )
        .await
    }

    /// Changes the refcounts in the blocks that are there.
    async fn refcounts(&mut self, pass: Pass) -> Result<()> {
        let geometry = self.walked.geometry;
        let order = geometry.refcount_order();
        for at in 0..self.walked.refcounts.blocks.len() {
            let block = self.walked.refcounts.blocks[at];
            if block.bad {
                continue;
            }
            let old = self.io.read(block.offset, geometry.cluster_bytes()).await?;
            let mut new = old.clone();
            let first = block.index << geometry.refcount_block_bits();
            let mut references = [0; CHUNK_CLUSTERS];
            let mut done = 0;
            while done < 1 << geometry.refcount_block_bits() {
                let step = (1 << geometry.refcount_block_bits()).min(CHUNK_CLUSTERS as u64);
                let references = &mut references[..to_usize(step)];
                self.walked.counts.fill(first + done, references);
                for (index, references) in (done..).zip(references.iter()) {
                    let is = refcount::get(&old, index, order);
                    let right = (*references).min(geometry.refcount_max());
                    if (pass == Pass::Raise && right > is) || (pass == Pass::Lower && right < is) {
                        refcount::set(&mut new, index, order, right);
                    }
                }
                done += step;
            }
            self.write_changed(block.offset, &old, &new).await?;
        }
        Ok(())
    }

    /// Changes COPIED flags in the active L1 table and its L2 tables, where nothing else uses their clusters.
    async fn copied_flags(&mut self, header: &Header, pass: Flags) -> Result<()> {
        let walked = &*self.walked;
        let bits = walked.geometry.cluster_bits();
        let l1 = header.l1_table.0;
        let l1_end = l1 + u64::from(header.l1_entries) * 8;
        let l1_bytes = (l1_end - l1)
            .next_multiple_of(SECTOR_BYTES as u64)
            .min(walked.file_len.saturating_sub(l1));
        let mut pieces = Vec::new();
        if !(l1 >> bits..(l1 + l1_bytes).div_ceil(1 << bits))
            .any(|cluster| walked.overlaps(cluster))
        {
            for start in (0..l1_bytes).step_by(to_usize(READ_BYTES)) {
                pieces.push((Table::L1, l1 + start, READ_BYTES.min(l1_bytes - start)));
            }
        }
        for (offset, l2) in &walked.l2 {
            if l2.active > 0 && !walked.overlaps(offset >> bits) {
                pieces.push((Table::L2, *offset, walked.geometry.cluster_bytes()));
            }
        }
        for (table, offset, bytes) in pieces {
            let old = self.io.read(offset, bytes).await?;
            let mut new = old.clone();
            let stride = match table {
                Table::L1 => 8,
                Table::L2 => to_usize(self.walked.geometry.l2_entry_bytes()),
            };
            // What follows the L1 table's entries in its last sector is not the table's (O28).
            let end = match table {
                Table::L1 => l1_end,
                Table::L2 => offset + bytes,
            };
            let entries = to_usize((end - offset).min(bytes)) / stride;
            for word in new.chunks_exact_mut(stride).take(entries) {
                let entry = u64::from_be_bytes(word[..8].try_into().expect("eight bytes"));
                let (copied, is_flag) = self.right_flag(table, entry, pass);
                if copied != (entry & COPIED != 0) {
                    word[..8].copy_from_slice(&(entry ^ COPIED).to_be_bytes());
                    self.mended.copied_changed += u64::from(is_flag);
                }
            }
            self.write_changed(offset, &old, &new).await?;
        }
        Ok(())
    }

    /// Whether an entry shall be COPIED, and whether that is a matter of refcounts.
    fn right_flag(&self, table: Table, entry: u64, pass: Flags) -> (bool, bool) {
        let walked = &*self.walked;
        let copied = entry & COPIED != 0;
        let offset = entry & OFFSET_MASK;
        let data_file = walked.data_file && table == Table::L2;
        if table == Table::L2 && entry & COMPRESSED != 0 {
            return (false, false);
        }
        if offset == 0 && !(data_file && copied) {
            // COPIED means nothing here. Beside the zero flag nobody minds it.
            return (copied && entry & ZERO != 0, false);
        }
        if data_file {
            return (copied || pass == Flags::Settle, true);
        }
        let cluster = offset >> walked.geometry.cluster_bits();
        let references = walked.counts.get(cluster);
        let right = match pass {
            // An entry whose cluster is not counted leads past the end of the file, where no refcount changes.
            Flags::Clear => {
                copied && (references == 1 || references == 0 && walked.singles.contains(cluster))
            }
            Flags::Settle => references <= 1 && walked.singles.contains(cluster),
        };
        (right, true)
    }
}

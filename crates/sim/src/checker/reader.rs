//! Reads what a guest would see, by following the tables for every cluster anew.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use crate::cipher::Xor;

use super::layout::{COMPRESSED, L1, Layout, OFFSET_MASK, index};
use super::{Owner, Table, Violation};

/// Gives `len` bytes of the backing file at an offset, zeroes past its end.
pub type Backing<'a> = &'a dyn Fn(u64, usize) -> Vec<u8>;

/// What an image's own tables say of a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing: the backing file shows.
    Unallocated,
    /// Zeroes, and no cluster of the file.
    Zero,
    /// Zeroes, though this place of the file is set aside for them.
    ZeroAllocated(u64),
    /// Data, from this place of the file on.
    Data(u64),
    /// Compressed data.
    Compressed,
}

/// Reads guest data out of an image. The dirty bit does not matter to it.
#[derive(Clone)]
pub struct GuestReader<'a> {
    layout: Layout<'a>,
    l1: L1,
    size: u64,
    backing: Option<Backing<'a>>,
    data_file: Option<&'a [u8]>,
    ciphered: bool,
}

impl<'a> GuestReader<'a> {
    /// The active state of an image.
    ///
    /// # Errors
    /// When the header makes no sense, the image is encrypted, or it names a backing file and none is given.
    pub fn open(image: &'a [u8], backing: Option<Backing<'a>>) -> Result<Self, Violation> {
        let layout = Layout::parse(image)?;
        if layout.crypt != 0 {
            return Err(Violation::Refused("encryption".to_owned()));
        }
        if layout.has_backing && backing.is_none() {
            return Err(Violation::Refused(
                "it names a backing file, and none was given".to_owned(),
            ));
        }
        let backing = backing.filter(|_| layout.has_backing);
        Ok(Self {
            l1: layout.active_l1(),
            size: layout.size,
            layout,
            backing,
            data_file: None,
            ciphered: false,
        })
    }

    /// Reads a snapshot instead, by its place in the snapshot table.
    ///
    /// # Errors
    /// When there is no such snapshot or the table makes no sense.
    pub fn snapshot(mut self, number: u32) -> Result<Self, Violation> {
        let (snapshots, _) = self.layout.snapshots()?;
        let missing = || Violation::Snapshot {
            number,
            why: "there is none".to_owned(),
        };
        let snapshot = snapshots.get(number as usize).ok_or_else(missing)?;
        self.l1 = L1 {
            table: Table::Snapshot(number),
            offset: snapshot.l1_offset,
            entries: snapshot.l1_entries,
        };
        self.size = snapshot.disk_size.unwrap_or(self.size);
        Ok(self)
    }

    /// With the external data file's bytes.
    #[must_use]
    pub fn with_data_file(mut self, data_file: &'a [u8]) -> Self {
        self.data_file = Some(data_file);
        self
    }

    /// Its data, if it is so, passes the [`cipher`](crate::cipher).
    #[must_use]
    pub fn ciphered(mut self, ciphered: bool) -> Self {
        self.ciphered = ciphered;
        self
    }

    /// Number of internal snapshots.
    #[must_use]
    pub fn snapshot_count(&self) -> u32 {
        self.layout.snapshot_count
    }

    /// The guest disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the tables say of the cluster that holds `offset`. Images with an external data file or extended L2 entries are not asked.
    ///
    /// # Errors
    /// When the L1 table is too small for the disk.
    pub fn state(&self, offset: u64) -> Result<State, Violation> {
        let layout = &self.layout;
        let guest = offset / layout.cluster();
        let l1_index = guest / layout.l2_entries();
        if l1_index >= self.l1.entries {
            return Err(Violation::BadTable {
                owner: Owner::L1(self.l1.table),
                offset: self.l1.offset,
                why: "too small for the disk",
            });
        }
        let l2 = layout.u64_at(self.l1.offset.saturating_add(l1_index * 8)) & OFFSET_MASK;
        if l2 == 0 {
            return Ok(State::Unallocated);
        }
        let entry = layout.u64_at(l2 + guest % layout.l2_entries() * layout.l2_entry_bytes());
        let host = entry & OFFSET_MASK;
        Ok(match (entry & 1 != 0 && layout.version == 3, host) {
            _ if entry & COMPRESSED != 0 => State::Compressed,
            (true, 0) => State::Zero,
            (true, host) => State::ZeroAllocated(host),
            (false, 0) => State::Unallocated,
            (false, host) => State::Data(host),
        })
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_bytes(&self) -> u64 {
        self.layout.cluster()
    }

    /// `len` bytes of the guest at `offset`; zeroes past the end of the disk.
    ///
    /// # Errors
    /// When a table is broken or compressed data cannot be decoded.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Violation> {
        let mut out = vec![0; len];
        self.read_zeroed(offset, &mut out)?;
        Ok(out)
    }

    /// As [`read`](Self::read), into memory that the caller has.
    ///
    /// # Errors
    /// As there.
    pub fn read_into(&self, offset: u64, out: &mut [u8]) -> Result<(), Violation> {
        out.fill(0);
        self.read_zeroed(offset, out)
    }

    fn read_zeroed(&self, offset: u64, out: &mut [u8]) -> Result<(), Violation> {
        let cluster = self.layout.cluster();
        let end = offset.saturating_add(out.len() as u64).min(self.size);
        let mut at = offset;
        while at < end {
            let part = (cluster - at % cluster).min(end - at);
            let start = index(at - offset);
            self.read_in_cluster(at, &mut out[start..start + index(part)])?;
            at += part;
        }
        Ok(())
    }

    /// Bytes that lie in one cluster; `out` is zero.
    fn read_in_cluster(&self, at: u64, out: &mut [u8]) -> Result<(), Violation> {
        let layout = &self.layout;
        let cluster = layout.cluster();
        let guest = at / cluster;
        let l1_index = guest / layout.l2_entries();
        if l1_index >= self.l1.entries {
            let owner = Owner::L1(self.l1.table);
            return Err(Violation::BadTable {
                owner,
                offset: self.l1.offset,
                why: "too small for the disk",
            });
        }
        let l1_at = self.l1.offset.saturating_add(l1_index * 8);
        let l2 = layout.u64_at(l1_at) & OFFSET_MASK;
        if l2 == 0 {
            self.read_backing(at, out);
            return Ok(());
        }
        let entry_at = l2 + guest % layout.l2_entries() * layout.l2_entry_bytes();
        let entry = layout.u64_at(entry_at);
        if entry & COMPRESSED != 0 {
            let data = self.decode(Owner::Compressed(self.l1.table, guest), entry)?;
            let start = index(at % cluster);
            out.copy_from_slice(&data[start..start + out.len()]);
            return Ok(());
        }
        if layout.extended_l2() {
            let bitmap = layout.u64_at(entry_at + 8);
            let subcluster = cluster / 32;
            let end = at + out.len() as u64;
            let mut from = at;
            while from < end {
                let bit = from % cluster / subcluster;
                let part = (subcluster - from % subcluster).min(end - from);
                let start = index(from - at);
                let out = &mut out[start..start + index(part)];
                match (bitmap >> bit & 1, bitmap >> (bit + 32) & 1) {
                    (1, _) => self.read_host(entry, from, out),
                    (_, 1) => {}
                    _ => self.read_backing(from, out),
                }
                from += part;
            }
            return Ok(());
        }
        // Version 2 does not define the flag; `check` tells it, and it can mean nothing else.
        if entry & 1 != 0 {
            return Ok(());
        }
        // With a data file, offset 0 is allocated when COPIED says so.
        if entry & OFFSET_MASK == 0 && !(layout.data_file() && entry >> 63 != 0) {
            self.read_backing(at, out);
        } else {
            self.read_host(entry, at, out);
        }
        Ok(())
    }

    fn read_host(&self, entry: u64, at: u64, out: &mut [u8]) {
        let host = (entry & OFFSET_MASK) + at % self.layout.cluster();
        let file = if self.layout.data_file() {
            self.data_file.unwrap_or_default()
        } else {
            self.layout.image
        };
        let start = index(host).min(file.len());
        let present = out.len().min(file.len() - start);
        out[..present].copy_from_slice(&file[start..start + present]);
        if self.ciphered {
            Xor::apply(host, out);
        }
    }

    fn read_backing(&self, at: u64, out: &mut [u8]) {
        if let Some(backing) = self.backing {
            let data = backing(at, out.len());
            let present = out.len().min(data.len());
            out[..present].copy_from_slice(&data[..present]);
        }
    }

    fn decode(&self, owner: Owner, entry: u64) -> Result<Rc<[u8]>, Violation> {
        let (start, len) = self.layout.compressed_range(entry);
        let image = self.layout.image;
        // The last sector may pass the end of the file.
        let end = index(start.saturating_add(len)).min(image.len());
        let input = &image[index(start).min(end)..end];
        decoded(self.layout.zstd, input, index(self.layout.cluster()))
            .ok_or(Violation::Undecodable { owner, entry })
    }
}

/// What compressed bytes decode to. The states of one workload hold the same ones over and over, so this thread remembers some.
fn decoded(zstd: bool, input: &[u8], len: usize) -> Option<Rc<[u8]>> {
    type Known = HashMap<(bool, usize, Box<[u8]>), Option<Rc<[u8]>>>;
    /// Clusters.
    const MOST: usize = 512;
    thread_local! {
        static KNOWN: RefCell<Known> = RefCell::default();
    }
    KNOWN.with_borrow_mut(|known| {
        let key = (zstd, len, Box::from(input));
        if let Some(found) = known.get(&key) {
            return found.clone();
        }
        let mut out = vec![0; len];
        let whole = if zstd {
            decode_zstd(input, &mut out)
        } else {
            decode_deflate(input, &mut out)
        };
        let found: Option<Rc<[u8]>> = whole.then(|| out.into());
        if known.len() == MOST {
            known.clear();
        }
        known.insert(key, found.clone());
        found
    })
}

/// Whether the raw deflate stream gives all of `out`. What follows in the stream or after it is ignored.
fn decode_deflate(input: &[u8], out: &mut [u8]) -> bool {
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), input, out, 0, flags);
    written == out.len()
}

fn decode_zstd(input: &[u8], out: &mut [u8]) -> bool {
    use std::io::Read;
    let mut input = input;
    match ruzstd::decoding::StreamingDecoder::new(&mut input) {
        Ok(mut decoder) => decoder.read_exact(out).is_ok(),
        Err(_) => false,
    }
}

//! From the bytes of cluster 0 to a [`Header`].

use super::limits::{check_backing_format, check_cluster_bits, check_header_bytes, check_version};
use super::{
    BackingName, BitmapsExtension, Compression, FEATURE_NAME_BYTES, FeatureKind, FeatureName,
    HEADER_BYTES_V2, HEADER_BYTES_V3_MIN, Header, MAGIC, autoclear, extension, incompatible,
};
use crate::bytes::{be32, be64};
use crate::names::{MAX_NAME_BYTES, NameFault};
use crate::{Error, HostOffset};

/// Offset of the compression type in the header of version 3.
const COMPRESSION_TYPE_AT: usize = 104;

/// Something wrong with a header that can be understood all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderFault {
    /// What it is.
    pub error: Error,
    /// What it concerns.
    pub kind: FaultKind,
}

/// What a [`HeaderFault`] concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A name, or an extension that is there twice: readers differ in what they make of it, so it is
    /// refused. Nothing in the image's tables depends on it.
    Name,
    /// A table that begins past the end of the file. A check says what is lost.
    Missing,
    /// A table, bitmaps or encryption whose place or length no program accepts.
    Table,
}

impl HeaderFault {
    fn name(error: Error) -> Self {
        let kind = FaultKind::Name;
        Self { error, kind }
    }

    fn table(error: Error) -> Self {
        let kind = FaultKind::Table;
        Self { error, kind }
    }
}

impl Header {
    /// Parses the start of an image file.
    ///
    /// `cluster0` are the first min(file length, 2 MiB) bytes of the file (more is ignored; less is enough as
    /// long as it holds the first cluster), `file_bytes` is the length of the file.
    ///
    /// Unknown features do not fail here, so that any image can be shown: ask
    /// [`check_supported`](Self::check_supported) before using one.
    ///
    /// # Errors
    /// [`Error::NotQcow2`] without the magic number. [`Error::Truncated`] where the file ends inside cluster 0
    /// or before the L1 or refcount table begins. (Their ends may pass it: what is not there reads as zeroes.)
    /// Any other limit of the format as [`Error::Invalid`] or [`Error::Name`], and an unknown compression type
    /// as [`Error::Unsupported`].
    pub fn parse(cluster0: &[u8], file_bytes: u64) -> Result<Self, Error> {
        let (header, faults) = Self::parse_leniently(cluster0, file_bytes)?;
        match faults.into_iter().next() {
            None => Ok(header),
            Some(fault) => Err(fault.error),
        }
    }

    /// As [`parse`](Self::parse), and goes on behind what does not keep the header from being shown. Such
    /// a header is for looking at: who uses the image asks that there be no faults, and a check that
    /// there be none of [`FaultKind::Table`]. What of bitmaps and encryption makes no sense is left out.
    ///
    /// # Errors
    /// What makes the header unreadable: no magic number, a cluster 0 that is cut off, sizes of other
    /// fields (version, cluster size, refcount width, header length), extensions or a backing file name
    /// that do not lie in cluster 0, an unknown compression type.
    pub fn parse_leniently(
        cluster0: &[u8],
        file_bytes: u64,
    ) -> Result<(Self, Vec<HeaderFault>), Error> {
        if !cluster0.starts_with(&MAGIC) {
            return Err(Error::NotQcow2);
        }
        need("the header", cluster0, HEADER_BYTES_V2 as usize)?;
        let version = be32(cluster0, 4);
        check_version(version)?;
        let cluster_bits = be32(cluster0, 20);
        check_cluster_bits(cluster_bits)?;
        let header_bytes = if version == 2 {
            HEADER_BYTES_V2
        } else {
            need("the header", cluster0, HEADER_BYTES_V3_MIN as usize)?;
            be32(cluster0, 100)
        };
        check_header_bytes(version, header_bytes, cluster_bits)?;
        let cluster_bytes = 1usize << cluster_bits;
        need("the header cluster", cluster0, cluster_bytes)?;

        let mut header = Self::parse_fields(&cluster0[..cluster_bytes], version, header_bytes)?;
        let (extensions_end, name) = find_backing_name(&cluster0[..cluster_bytes], header_bytes)?;
        let mut extensions = Extensions {
            header: &mut header,
            backing_format: None,
            seen: 0,
            faults: Vec::new(),
        };
        extensions.parse(&cluster0[header_bytes as usize..extensions_end])?;
        let (format, mut faults) = (extensions.backing_format, extensions.faults);
        header.adopt_backing(name, format);
        header.check_features()?;
        let mut judge = |result: Result<(), Error>, kind| {
            let error = result.err()?;
            let fault = HeaderFault { error, kind };
            if !faults.contains(&fault) {
                faults.push(fault);
            }
            Some(())
        };
        judge(header.check_tables(), FaultKind::Table);
        judge(header.check_names(), FaultKind::Name);
        if judge(header.check_extensions(), FaultKind::Table).is_some() {
            // Nobody reads at places that make no sense.
            (header.bitmaps, header.luks) = (None, None);
        }
        let tables = [
            (
                "the refcount table",
                header.refcount_table,
                header.refcount_table_clusters,
            ),
            ("the L1 table", header.l1_table, header.l1_entries),
        ];
        for (structure, table, entries) in tables {
            let result = check_start(structure, table, entries, file_bytes);
            judge(result, FaultKind::Missing);
        }
        Ok((header, faults))
    }

    /// The fixed fields. `header_bytes` has been checked against `cluster0`.
    fn parse_fields(cluster0: &[u8], version: u32, header_bytes: u32) -> Result<Self, Error> {
        let v3 = version >= 3;
        let feature_bits = |at| if v3 { be64(cluster0, at) } else { 0 };
        let tail = &cluster0[..header_bytes as usize];
        let compression = match tail.get(COMPRESSION_TYPE_AT) {
            None | Some(0) => Compression::Deflate,
            Some(1) => Compression::Zstd,
            Some(other) => {
                if feature_bits(72) & incompatible::COMPRESSION == 0 {
                    let expected = "0, because incompatible bit 3 is not set";
                    return Err(Error::invalid("compression_type", *other, expected));
                }
                return Err(Error::Unsupported {
                    feature: format!("compression type {other}"),
                });
            }
        };
        let unknown = tail.get(COMPRESSION_TYPE_AT + 1..).unwrap_or_default();
        let unknown_end = unknown
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| last + 1);
        Ok(Self {
            version,
            header_bytes,
            cluster_bits: be32(cluster0, 20),
            size: be64(cluster0, 24),
            crypt_method: be32(cluster0, 32),
            l1_entries: be32(cluster0, 36),
            l1_table: HostOffset(be64(cluster0, 40)),
            refcount_table: HostOffset(be64(cluster0, 48)),
            refcount_table_clusters: be32(cluster0, 56),
            snapshot_count: be32(cluster0, 60),
            snapshot_table: HostOffset(be64(cluster0, 64)),
            incompatible: feature_bits(72),
            compatible: feature_bits(80),
            autoclear: feature_bits(88),
            refcount_order: if v3 { be32(cluster0, 96) } else { 4 },
            compression,
            backing: None,
            data_file: None,
            bitmaps: None,
            luks: None,
            feature_names: Vec::new(),
            unknown_extensions: Vec::new(),
            unknown_header_bytes: unknown[..unknown_end].to_vec(),
        })
    }

    /// Joins the name and the format. A format without a name is kept among the unknown extensions.
    fn adopt_backing(&mut self, name: Option<Vec<u8>>, format: Option<String>) {
        match (name, format) {
            (Some(name), format) => self.backing = Some(BackingName { name, format }),
            (None, Some(format)) => {
                self.unknown_extensions
                    .push((extension::BACKING_FORMAT, format.into_bytes()));
            }
            (None, None) => {}
        }
    }
}

fn check_start(
    structure: &'static str,
    table: HostOffset,
    entries: u32,
    file_bytes: u64,
) -> Result<(), Error> {
    if entries != 0 && table.0 >= file_bytes {
        return Err(Error::Truncated {
            structure,
            need_bytes: table.0.saturating_add(1),
            have_bytes: file_bytes,
        });
    }
    Ok(())
}

fn need(structure: &'static str, bytes: &[u8], need: usize) -> Result<(), Error> {
    if bytes.len() < need {
        let (need_bytes, have_bytes) = (need as u64, bytes.len() as u64);
        return Err(Error::Truncated {
            structure,
            need_bytes,
            have_bytes,
        });
    }
    Ok(())
}

/// Where the extensions end, and the backing file's name.
fn find_backing_name(
    cluster0: &[u8],
    header_bytes: u32,
) -> Result<(usize, Option<Vec<u8>>), Error> {
    let offset = be64(cluster0, 8);
    if offset == 0 {
        return Ok((cluster0.len(), None));
    }
    let start = match usize::try_from(offset) {
        Ok(start) if start >= header_bytes as usize && start <= cluster0.len() => start,
        _ => {
            let expected = format!(
                "0, or {header_bytes} to {}: in cluster 0, behind the header",
                cluster0.len()
            );
            return Err(Error::invalid("backing_file_offset", offset, expected));
        }
    };
    let bytes = be32(cluster0, 16) as usize;
    if bytes > MAX_NAME_BYTES {
        let fault = NameFault::TooLong {
            bytes: bytes as u64,
        };
        return Err(Error::Name {
            field: "backing file name",
            fault,
        });
    }
    let Some(name) = cluster0.get(start..start + bytes) else {
        let expected = format!(
            "at most {}: the name must end in cluster 0",
            cluster0.len() - start
        );
        return Err(Error::invalid("backing_file_size", bytes as u64, expected));
    };
    Ok((start, (!name.is_empty()).then(|| name.to_vec())))
}

/// Collects the extensions.
struct Extensions<'a> {
    header: &'a mut Header,
    backing_format: Option<String>,
    /// One bit for each known type met: readers differ in which of two they believe, so twice is refused.
    seen: u32,
    faults: Vec<HeaderFault>,
}

impl Extensions<'_> {
    fn parse(&mut self, area: &[u8]) -> Result<(), Error> {
        let mut rest = area;
        while !rest.is_empty() {
            let at = self.header.header_bytes as usize + (area.len() - rest.len());
            let Some((head, data)) = rest.split_at_checked(8) else {
                let expected = "8 bytes of room for a type and a length before the extensions' end";
                return Err(Error::invalid(
                    "header extension offset",
                    at as u64,
                    expected,
                ));
            };
            let (kind, bytes) = (be32(head, 0), be32(head, 4));
            let Some(value) = data.get(..bytes as usize) else {
                let expected = format!("at most {} for the extension at byte {at}", data.len());
                return Err(Error::invalid("header extension length", bytes, expected));
            };
            if kind == extension::END {
                return Ok(());
            }
            self.take(kind, value)?;
            // The last one's padding may be cut off.
            rest = &data[value.len().next_multiple_of(8).min(data.len())..];
        }
        Ok(())
    }

    fn take(&mut self, kind: u32, value: &[u8]) -> Result<(), Error> {
        let known = [
            extension::BACKING_FORMAT,
            extension::FEATURE_NAMES,
            extension::BITMAPS,
            extension::LUKS,
            extension::DATA_FILE,
        ];
        if let Some(bit) = known.iter().position(|known| *known == kind) {
            self.once(kind, bit);
        }
        match kind {
            extension::BACKING_FORMAT => self.take_backing_format(value),
            extension::FEATURE_NAMES => {
                self.header.feature_names = value
                    .chunks_exact(FEATURE_NAME_BYTES)
                    .map(parse_feature_name)
                    .collect();
            }
            extension::BITMAPS => self.take_bitmaps(value),
            extension::LUKS if value.len() == 16 => {
                self.header.luks = Some((HostOffset(be64(value, 0)), be64(value, 8)));
            }
            extension::LUKS => self.table_fault(length_fault("LUKS", value, "16")),
            extension::DATA_FILE => self.header.data_file = Some(value.to_vec()),
            _ => self.header.unknown_extensions.push((kind, value.to_vec())),
        }
        Ok(())
    }

    /// QEMU of 2009 padded the name with NULs. They end it, for every program.
    fn take_backing_format(&mut self, value: &[u8]) {
        let end = value.iter().rposition(|&byte| byte != 0);
        let name = &value[..end.map_or(0, |last| last + 1)];
        if name.is_empty() {
            return;
        }
        let text = std::str::from_utf8(name);
        let fault = check_backing_format(name).err().or_else(|| {
            text.is_err().then_some(Error::Name {
                field: "backing format",
                fault: NameFault::NotText,
            })
        });
        self.faults.extend(fault.map(HeaderFault::name));
        self.backing_format = Some(String::from_utf8_lossy(name).into_owned());
    }

    fn take_bitmaps(&mut self, value: &[u8]) {
        if self.header.autoclear & autoclear::BITMAPS == 0 {
            // Stale: somebody wrote who does not know bitmaps. Nothing in it can be relied on.
            self.header
                .unknown_extensions
                .push((extension::BITMAPS, value.to_vec()));
            return;
        }
        if value.len() != 24 {
            return self.table_fault(length_fault("bitmaps", value, "24"));
        }
        let reserved = be32(value, 4);
        if reserved != 0 {
            let field = "reserved field of the bitmaps extension";
            return self.table_fault(Error::invalid(field, reserved, "0"));
        }
        self.header.bitmaps = Some(BitmapsExtension {
            count: be32(value, 0),
            directory_bytes: be64(value, 8),
            directory: HostOffset(be64(value, 16)),
        });
    }

    fn table_fault(&mut self, error: Error) {
        self.faults.push(HeaderFault::table(error));
    }

    fn once(&mut self, kind: u32, bit: usize) {
        if self.seen & (1 << bit) != 0 {
            let expected = "each known type only once";
            let error = Error::invalid("header extension type", kind, expected);
            // Which clusters are in use depends on these two.
            let is_table = matches!(kind, extension::BITMAPS | extension::LUKS);
            self.faults.push(if is_table {
                HeaderFault::table(error)
            } else {
                HeaderFault::name(error)
            });
        }
        self.seen |= 1 << bit;
    }
}

fn length_fault(name: &'static str, value: &[u8], expected: &str) -> Error {
    let field = match name {
        "LUKS" => "length of the LUKS extension",
        _ => "length of the bitmaps extension",
    };
    Error::invalid(field, value.len() as u64, expected)
}

/// Decodes an entry of exactly [`FEATURE_NAME_BYTES`].
fn parse_feature_name(entry: &[u8]) -> FeatureName {
    let kind = match entry[0] {
        0 => FeatureKind::Incompatible,
        1 => FeatureKind::Compatible,
        2 => FeatureKind::Autoclear,
        other => FeatureKind::Other(other),
    };
    let name = entry[2..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default()
        .to_vec();
    FeatureName {
        kind,
        bit: entry[1],
        name,
    }
}

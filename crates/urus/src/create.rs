//! Making new images.

use std::path::{Path, PathBuf};

use crate::device::pending;
use crate::{Compression, Format, Result};

/// What [`create`] makes. The defaults are qemu-img's: qcow2 version 3, 64 KiB clusters, 16-bit refcounts, zlib.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    pub(crate) format: Format,
    pub(crate) size: Option<u64>,
    pub(crate) version: u32,
    pub(crate) cluster_bytes: u64,
    pub(crate) refcount_bits: u32,
    pub(crate) lazy_refcounts: bool,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<(PathBuf, Format)>,
    pub(crate) open_backing: bool,
    pub(crate) overwrite: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            version: 3,
            cluster_bytes: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::default(),
            backing: None,
            open_backing: true,
            overwrite: false,
        }
    }
}

impl CreateOptions {
    /// A qcow2 image of QEMU's defaults. The size must be given, or a backing file to take it from.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// qcow2 (unless stated) or raw.
    pub fn format(&mut self, format: Format) -> &mut Self {
        self.format = format;
        self
    }

    /// Size of the virtual disk in bytes; rounded up to a multiple of 512.
    pub fn size(&mut self, bytes: u64) -> &mut Self {
        self.size = Some(bytes);
        self
    }

    /// Version of the format: 2 (compat 0.10) or 3 (compat 1.1).
    pub fn version(&mut self, version: u32) -> &mut Self {
        self.version = version;
        self
    }

    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub fn cluster_bytes(&mut self, bytes: u64) -> &mut Self {
        self.cluster_bytes = bytes;
        self
    }

    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub fn refcount_bits(&mut self, bits: u32) -> &mut Self {
        self.refcount_bits = bits;
        self
    }

    /// Set the lazy-refcounts flag.
    pub fn lazy_refcounts(&mut self, lazy: bool) -> &mut Self {
        self.lazy_refcounts = lazy;
        self
    }

    /// How compressed clusters will be compressed.
    pub fn compression(&mut self, compression: Compression) -> &mut Self {
        self.compression = compression;
        self
    }

    /// A backing file, by the name to record (a relative one is relative to the directory of the new image), and its format.
    pub fn backing(&mut self, name: impl Into<PathBuf>, format: Format) -> &mut Self {
        self.backing = Some((name.into(), format));
        self
    }

    /// Open the backing file, to see that it is one and to take its size where none is given (default). Without, as
    /// `qemu-img create -u`, the name is recorded unseen.
    pub fn open_backing(&mut self, open: bool) -> &mut Self {
        self.open_backing = open;
        self
    }

    /// Replace a file that exists. By default it is left alone and the call fails.
    pub fn overwrite(&mut self, overwrite: bool) -> &mut Self {
        self.overwrite = overwrite;
        self
    }
}

/// Makes a new image file. Durable on return; on failure no new file is left behind.
///
/// # Errors
/// A file that exists (unless [`CreateOptions::overwrite`]), options that do not go together, or what the operating
/// system says.
pub fn create(_path: impl AsRef<Path>, _options: &CreateOptions) -> Result<()> {
    Err(pending())
}

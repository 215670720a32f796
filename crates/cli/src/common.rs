//! Command-line values that several subcommands take.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use urus::{BackingPolicy, CacheMode, DiscardPolicy, Format, IoDriver};

use crate::failure::Failure;

/// Image formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// QCOW2, version 2 or 3
    Qcow2,
    /// The file's bytes are the disk
    Raw,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Qcow2 => Self::Qcow2,
            FormatArg::Raw => Self::Raw,
        }
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputArg {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// What lies between the image and the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheArg {
    /// The host's page cache; a flush is durable
    #[default]
    Writeback,
    /// Nothing (O_DIRECT)
    None,
}

impl From<CacheArg> for CacheMode {
    fn from(cache: CacheArg) -> Self {
        match cache {
            CacheArg::Writeback => Self::Writeback,
            CacheArg::None => Self::None,
        }
    }
}

impl CacheArg {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
        }
    }
}

/// What does the I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum IoArg {
    /// io_uring where the kernel has it, else blocking
    #[default]
    Auto,
    /// io_uring, or an error
    #[value(name = "io_uring")]
    IoUring,
    /// Plain system calls on a few threads
    #[value(alias = "threads")]
    Blocking,
}

impl From<IoArg> for IoDriver {
    fn from(io: IoArg) -> Self {
        match io {
            IoArg::Auto => Self::Auto,
            IoArg::IoUring => Self::IoUring,
            IoArg::Blocking => Self::Blocking,
        }
    }
}

/// What a guest's discards do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiscardArg {
    /// Give the space back to the host
    #[default]
    #[value(alias = "on")]
    Unmap,
    /// Nothing
    #[value(alias = "off")]
    Ignore,
}

impl From<DiscardArg> for DiscardPolicy {
    fn from(discard: DiscardArg) -> Self {
        match discard {
            DiscardArg::Unmap => Self::Unmap,
            DiscardArg::Ignore => Self::Ignore,
        }
    }
}

impl DiscardArg {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Ignore => "ignore",
        }
    }
}

/// Which backing files may be opened.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct BackingArgs {
    /// Allow backing files beneath DIR (by default: beneath the directory of the image that names them)
    #[arg(long, value_name = "DIR", conflicts_with = "no_backing")]
    backing_dir: Option<PathBuf>,

    /// Refuse an image that has a backing file
    #[arg(long)]
    no_backing: bool,

    /// The format of backing files whose format no image records; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<FormatArg>,
}

impl BackingArgs {
    pub(crate) fn apply(&self, options: &mut urus::OpenOptions) {
        options.backing(if self.no_backing {
            BackingPolicy::Forbid
        } else if let Some(dir) = &self.backing_dir {
            BackingPolicy::Dir(dir.clone())
        } else {
            BackingPolicy::Beneath
        });
        if let Some(format) = self.backing_format {
            options.backing_format(format.into());
        }
    }
}

/// The format of a file that is only looked at: as stated, or qcow2 if it begins as one, as qemu-img has it. What is opened to be
/// used is never guessed.
pub(crate) fn format_to_inspect(
    path: &Path,
    stated: Option<FormatArg>,
    lock: bool,
) -> Result<Format, Failure> {
    match stated {
        Some(format) => Ok(format.into()),
        None => {
            let info = urus::info(path, urus::InfoOptions::new().lock(lock))
                .map_err(crate::info::or_force_share)?;
            warn_of_foreign(&info);
            Ok(info.format)
        }
    }
}

/// A file that is shown as raw and looks like something else is nothing that urus can say much of.
pub(crate) fn warn_of_foreign(info: &urus::ImageInfo) {
    if let Some(text) = info.foreign_text() {
        crate::output::complain(&format!(
            "urus: {}: warning: {text}; it is shown as raw",
            info.path.display()
        ));
    }
}

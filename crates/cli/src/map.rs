//! `urus map`, as `qemu-img map`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use urus::{BlockingIo, Device, Extent, Format, InfoOptions, OpenOptions};

use crate::common::{BackingArgs, FormatArg, OutputArg, format_to_inspect};
use crate::failure::{Failure, Outcome};
use crate::info::or_force_share;
use crate::output::print;
use crate::size::Size;

/// Show which parts of an image are allocated, and where
///
/// Takes qemu-img map's flags and prints what it prints. The image is opened read-only, with its backing files as the rules for
/// backing files allow.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; by default qcow2 if it begins as one, else raw
    #[arg(short, long, value_name = "FMT")]
    format: Option<FormatArg>,

    /// How to print
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: OutputArg,

    /// Where to begin on the virtual disk
    #[arg(
        short,
        long,
        value_name = "OFFSET",
        default_value = "0",
        allow_negative_numbers = true
    )]
    start_offset: Size,

    /// How much to show
    #[arg(
        short = 'l',
        long,
        value_name = "LENGTH",
        allow_negative_numbers = true
    )]
    max_length: Option<Size>,

    /// Also when another process writes the image; what is shown may be stale
    #[arg(short = 'U', long)]
    force_share: bool,

    #[command(flatten)]
    backing: BackingArgs,

    /// The image
    pub(crate) file: PathBuf,
}

/// How much is asked about at once.
const STEP_BYTES: u64 = 8 << 30;

pub(crate) fn run(args: Args) -> Outcome {
    let mut options = OpenOptions::new();
    options
        .read_only(true)
        .lock(!args.force_share)
        .format(format_to_inspect(
            &args.file,
            args.format,
            !args.force_share,
        )?);
    args.backing.apply(&mut options);
    let device = options.open(&args.file).map_err(or_force_share)?;

    let start = args.start_offset.0;
    let end = args
        .max_length
        .map_or(u64::MAX, |length| start.saturating_add(length.0))
        .min(device.size());
    let mut printer = Printer::begin(args.output, names(&args.file, &device));
    let mut pieces = Pieces { last: None };
    let mut io = device.blocking()?;
    walk(&mut io, start, end, |extent| match pieces.add(extent) {
        Some(extent) => printer.show(&extent),
        None => Ok(()),
    })?;
    // An empty range still gets an answer.
    let last = pieces.last.take().unwrap_or(Extent {
        start,
        len: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        host: None,
    });
    printer.show(&last)?;
    printer.end();
    drop(io);
    device.close()?;
    Ok(ExitCode::SUCCESS)
}

/// What to call the layers: as qemu-img does, by the names that the images record, seen from here.
fn names(file: &Path, device: &Device) -> Vec<String> {
    let mut names = vec![file.to_owned()];
    for layer in &device.layers()[1..] {
        let above = names.last().expect("the image itself");
        // They are open and locked: looking at them again is harmless.
        let recorded = urus::info(above, InfoOptions::new().format(Format::Qcow2).lock(false))
            .ok()
            .and_then(|info| info.qcow2?.backing?.path);
        names.push(recorded.unwrap_or_else(|| layer.path.clone()));
    }
    names
        .iter()
        .map(|name| name.display().to_string())
        .collect()
}

fn walk(
    io: &mut BlockingIo,
    start: u64,
    end: u64,
    mut each: impl FnMut(Extent) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut at = start;
    while at < end {
        let extents = io.block_status(at, (end - at).min(STEP_BYTES))?;
        let before = at;
        for extent in extents {
            at = extent.start + extent.len;
            each(extent)?;
        }
        if at <= before {
            return Err(Failure::new(format!(
                "the engine does not say what is at offset {at}; this is a bug of urus"
            )));
        }
    }
    Ok(())
}

/// Puts neighbours of one kind together.
struct Pieces {
    last: Option<Extent>,
}

impl Pieces {
    /// Returns the extent before, once it is known to be complete.
    fn add(&mut self, next: Extent) -> Option<Extent> {
        match &mut self.last {
            Some(last) if continues(last, &next) => {
                last.len += next.len;
                None
            }
            last => last.replace(next),
        }
    }
}

fn continues(one: &Extent, next: &Extent) -> bool {
    let kind = |extent: &Extent| {
        (
            extent.depth,
            extent.present,
            extent.zero,
            extent.data,
            extent.compressed,
        )
    };
    kind(one) == kind(next) && next.host == one.host.map(|host| host + one.len)
}

/// Prints extents as they come: an image may have millions.
struct Printer {
    output: OutputArg,
    /// Of each layer.
    files: Vec<String>,
    text: String,
    is_first: bool,
}

impl Printer {
    /// Flushed when this many bytes have come together.
    const BYTES: usize = 64 << 10;

    fn begin(output: OutputArg, files: Vec<String>) -> Self {
        let text = match output {
            OutputArg::Human => {
                format!(
                    "{:<16}{:<16}{:<16}{}\n",
                    "Offset", "Length", "Mapped to", "File"
                )
            }
            OutputArg::Json => "[".to_owned(),
        };
        Self {
            output,
            files,
            text,
            is_first: true,
        }
    }

    fn show(&mut self, extent: &Extent) -> Result<(), Failure> {
        match self.output {
            OutputArg::Human => self.show_human(extent)?,
            OutputArg::Json => self.show_json(extent),
        }
        if self.text.len() >= Self::BYTES {
            self.flush();
        }
        Ok(())
    }

    fn show_human(&mut self, extent: &Extent) -> Result<(), Failure> {
        if !extent.data || extent.zero {
            return Ok(());
        }
        let Some(host) = extent.host else {
            self.flush();
            return Err(Failure::new(
                "File contains external, encrypted or compressed clusters: use --output json",
            ));
        };
        let hex = |value: u64| match value {
            0 => "0".to_owned(),
            value => format!("{value:#x}"),
        };
        let file = usize::try_from(extent.depth)
            .ok()
            .and_then(|depth| self.files.get(depth))
            .map_or("", String::as_str);
        self.text.push_str(&format!(
            "{:<16}{:<16}{:<16}{file}\n",
            hex(extent.start),
            hex(extent.len),
            hex(host)
        ));
        Ok(())
    }

    fn show_json(&mut self, extent: &Extent) {
        if !std::mem::take(&mut self.is_first) {
            self.text.push_str(",\n");
        }
        self.text.push_str(&format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
            extent.start,
            extent.len,
            extent.depth,
            extent.present,
            extent.zero,
            extent.data,
            extent.compressed
        ));
        if let Some(host) = extent.host {
            self.text.push_str(&format!(", \"offset\": {host}"));
        }
        self.text.push('}');
    }

    fn flush(&mut self) {
        print(&self.text);
        self.text.clear();
    }

    fn end(mut self) {
        if self.output == OutputArg::Json {
            self.text.push_str("]\n");
        }
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    //! Guards the joining of neighbours.
    use super::*;

    fn extent(start: u64, len: u64, host: Option<u64>) -> Extent {
        Extent {
            start,
            len,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            host,
        }
    }

    #[test]
    fn neighbours_are_joined_where_their_data_is_contiguous() {
        let mut pieces = Pieces { last: None };
        assert_eq!(pieces.add(extent(0, 10, Some(100))), None);
        assert_eq!(pieces.add(extent(10, 10, Some(110))), None);
        let whole = pieces.add(extent(20, 10, Some(200)));
        assert_eq!(whole, Some(extent(0, 20, Some(100))));
        assert!(pieces.add(extent(30, 5, None)).is_some());
        assert_eq!(pieces.add(extent(35, 5, None)), None);
        assert_eq!(pieces.last, Some(extent(30, 10, None)));
    }
}

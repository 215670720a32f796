//! `urus info`, as `qemu-img info`.

mod human;
mod json;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use urus::{Format, ImageInfo, InfoOptions};

use crate::common::{FormatArg, OutputArg};
use crate::failure::{Failure, Outcome};
use crate::output::{complain, print, print_json};

/// Show what an image is
///
/// Takes qemu-img info's flags and prints what it prints. Reads the header only: nothing is repaired, nothing is changed, and
/// no other file is opened unless --backing-chain asks for it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; by default qcow2 if it begins as one, else raw
    #[arg(short, long, value_name = "FMT")]
    format: Option<FormatArg>,

    /// How to print
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: OutputArg,

    /// Go on with the backing file, and its backing file, and so on
    #[arg(long)]
    backing_chain: bool,

    /// Also when another process writes the image; what is shown may be stale
    #[arg(short = 'U', long)]
    force_share: bool,

    /// The image
    pub(crate) file: PathBuf,
}

pub(crate) fn run(args: Args) -> Outcome {
    let chain = chain(&args)?;
    for info in &chain {
        for fault in info.qcow2.iter().flat_map(|qcow2| &qcow2.faults) {
            let image = info.path.display();
            complain(&format!("urus: warning: {image}: {fault}"));
        }
    }
    match args.output {
        OutputArg::Human => {
            let images: Vec<String> = chain.iter().map(human::text).collect();
            print(&images.join("\n"));
        }
        OutputArg::Json if args.backing_chain => {
            print_json(&chain.iter().map(json::image).collect::<Vec<_>>());
        }
        OutputArg::Json => print_json(&json::image(&chain[0])),
    }
    Ok(ExitCode::SUCCESS)
}

/// The image, and what is below it where that is asked for.
fn chain(args: &Args) -> Result<Vec<ImageInfo>, Failure> {
    let mut options = InfoOptions::new();
    options.lock(!args.force_share);
    let mut next = Some((args.file.clone(), args.format.map(Format::from)));
    let mut chain: Vec<ImageInfo> = Vec::new();
    let mut seen = HashSet::new();
    while let Some((path, format)) = next.take() {
        if !seen.insert(identity(&path)) {
            return Err(Failure::new(format!(
                "{}: backing file '{}' creates an infinite loop",
                args.file.display(),
                path.display()
            )));
        }
        let mut options = options.clone();
        if let Some(format) = format {
            options.format(format);
        }
        let info = urus::info(&path, &options).map_err(|error| match chain.last() {
            Some(above) => Failure::new(format!(
                "{}: its backing file: {error}",
                above.path.display()
            )),
            None => or_force_share(error),
        })?;
        crate::common::warn_of_foreign(&info);
        if args.backing_chain {
            next = below(&info)?;
        }
        chain.push(info);
    }
    Ok(chain)
}

/// What can be looked at all the same is said to be.
pub(crate) fn or_force_share(error: urus::Error) -> Failure {
    let is_locked = matches!(error, urus::Error::InUse { .. });
    let failure = Failure::from(error);
    if is_locked {
        failure.or("or look at it as it is now, which may be stale, with -U")
    } else {
        failure
    }
}

/// What the image stands on. The format as recorded.
fn below(info: &ImageInfo) -> Result<Option<(PathBuf, Option<Format>)>, Failure> {
    let Some(backing) = info.qcow2.as_ref().and_then(|qcow2| qcow2.backing.as_ref()) else {
        return Ok(None);
    };
    let refuse = |why: String| {
        Err(Failure::new(format!(
            "{}: its backing file '{}': {why}",
            info.path.display(),
            backing.name
        )))
    };
    let Some(path) = &backing.path else {
        return refuse("that is not the name of a file".to_owned());
    };
    match &backing.format {
        None => Ok(Some((path.clone(), None))),
        Some(name) => match Format::from_name(name) {
            Some(format) => Ok(Some((path.clone(), Some(format)))),
            None => refuse(format!("the format {name} is not supported")),
        },
    }
}

/// What makes two paths the same file. A path that leads nowhere is only itself.
fn identity(path: &Path) -> (u64, u64, PathBuf) {
    match fs::metadata(path) {
        Ok(status) => (status.dev(), status.ino(), PathBuf::new()),
        Err(_) => (0, 0, path.to_owned()),
    }
}

//! `urus check`, as `qemu-img check`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use serde::Serialize;
use urus::{CheckOptions, CheckReport, Format, Repair};

use crate::common::{FormatArg, OutputArg, format_to_inspect};
use crate::failure::{Failure, Outcome};
use crate::output::{complain, print, print_json};

/// Check an image, and repair it
///
/// Takes qemu-img check's flags and prints what it prints. Exit codes as qemu-img's: 0 nothing is wrong (any more), 1 the check
/// could not be done or the command was not understood, 2 the image is corrupt, 3 it has leaked clusters only (space is wasted, data is safe), 63 the format
/// has nothing to check.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the image; by default qcow2 if it begins as one, else raw
    #[arg(short, long, value_name = "FMT")]
    format: Option<FormatArg>,

    /// Repair what is found
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<RepairArg>,

    /// How to print
    #[arg(long, value_name = "HOW", default_value = "human")]
    output: OutputArg,

    /// Print errors only
    #[arg(short, long)]
    quiet: bool,

    /// Check even if another process writes the image: what is found may be wrong. Not together with --repair
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Cache mode, for qemu-img's sake: none, writeback, writethrough, directsync or unsafe. A check reads through the page
    /// cache in any mode, and a repair is durable in any mode
    #[arg(short = 'T', long, value_name = "MODE", value_parser = CACHE_MODES)]
    cache: Option<String>,

    /// The image
    pub(crate) file: PathBuf,
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairArg {
    /// Give leaked clusters back
    Leaks,
    /// Everything that can be repaired
    All,
}

impl From<RepairArg> for Repair {
    fn from(repair: RepairArg) -> Self {
        match repair {
            RepairArg::Leaks => Self::Leaks,
            RepairArg::All => Self::All,
        }
    }
}

/// What qemu-img takes for `-T`.
const CACHE_MODES: [&str; 6] = [
    "none",
    "off",
    "writeback",
    "writethrough",
    "directsync",
    "unsafe",
];

/// What a format without metadata exits with.
const NOT_CHECKABLE: u8 = 63;

pub(crate) fn run(args: Args) -> Outcome {
    if args.force_share && args.repair.is_some() {
        return Err(Failure::new(
            "--force-share (-U) can only be used without --repair: a repair needs the image alone",
        ));
    }
    let format = format_to_inspect(&args.file, args.format, !args.force_share)?;
    if format != Format::Qcow2 {
        return Err(
            Failure::new("This image format does not support checks").with_code(NOT_CHECKABLE)
        );
    }
    let repair = args.repair.map_or(Repair::None, Repair::from);
    let mut options = CheckOptions::new();
    options.repair(repair).lock(!args.force_share);
    let found = urus::check_with(&args.file, &options)?;
    let report = Report::new(args.file.display().to_string(), &found);
    if !args.quiet || args.output == OutputArg::Json {
        // Piece by piece on standard error, as with qemu-img.
        for finding in &found.messages {
            complain(&finding.to_string());
        }
    }
    match args.output {
        OutputArg::Human if args.quiet => {}
        OutputArg::Human => print(&report.text()),
        OutputArg::Json => print_json(&report),
    }
    if report.check_errors > 0 {
        return Err(Failure::new("Check failed"));
    }
    Ok(report.code())
}

/// What was found, in QEMU's terms (ImageCheck), with fields in the order in which qemu-img prints them.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    filename: String,
    format: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants a reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Report {
    fn new(filename: String, found: &CheckReport) -> Self {
        Self {
            image_end_offset: found.image_end_offset,
            compressed_clusters: found.compressed_clusters,
            total_clusters: found.total_clusters,
            corruptions: found.corruptions,
            check_errors: found.check_errors,
            leaks: found.leaks,
            leaks_fixed: found.leaks_fixed,
            corruptions_fixed: found.corruptions_fixed,
            allocated_clusters: found.allocated_clusters,
            filename,
            format: Format::Qcow2.name(),
            fragmented_clusters: found.fragmented_clusters,
        }
    }

    fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self {
                corruptions: 1.., ..
            } => 2,
            Self { leaks: 1.., .. } => 3,
            _ => 0,
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if self.leaks_fixed > 0 || self.corruptions_fixed > 0 {
            text.push_str(&format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...\n",
                self.leaks_fixed, self.corruptions_fixed
            ));
        }
        if self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0 {
            text.push_str("No errors were found on the image.\n");
        }
        if self.corruptions > 0 {
            text.push_str(&format!(
                "\n{} errors were found on the image.\n\
                 Data may be corrupted, or further writes to the image may corrupt it.\n",
                self.corruptions
            ));
        }
        if self.leaks > 0 {
            text.push_str(&format!(
                "\n{} leaked clusters were found on the image.\n\
                 This means waste of disk space, but no harm to data.\n",
                self.leaks
            ));
        }
        if self.check_errors > 0 {
            text.push_str(&format!(
                "\n{} internal errors have occurred during the check.\n",
                self.check_errors
            ));
        }
        if self.total_clusters > 0 && self.allocated_clusters > 0 {
            text.push_str(&format!(
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
                self.allocated_clusters,
                self.total_clusters,
                percent(self.allocated_clusters, self.total_clusters),
                percent(self.fragmented_clusters, self.allocated_clusters),
                percent(self.compressed_clusters, self.allocated_clusters),
            ));
        }
        if self.image_end_offset > 0 {
            text.push_str(&format!("Image end offset: {}\n", self.image_end_offset));
        }
        text
    }
}

#[allow(clippy::cast_precision_loss, reason = "two decimals are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

#[cfg(test)]
mod tests {
    //! Guards text and exit codes, which scripts depend on.
    use super::*;

    fn report() -> Report {
        Report {
            image_end_offset: 13_500_416,
            total_clusters: 1024,
            allocated_clusters: 160,
            filename: "a".into(),
            format: "qcow2",
            ..Report::default()
        }
    }

    #[test]
    fn text_is_what_qemu_img_prints() {
        let statistics = "160/1024 = 15.62% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
                          Image end offset: 13500416\n";
        let clean = report();
        assert_eq!(
            clean.text(),
            format!("No errors were found on the image.\n{statistics}")
        );
        let leaks = Report {
            leaks: 1,
            ..report()
        };
        assert_eq!(
            leaks.text(),
            format!(
                "\n1 leaked clusters were found on the image.\n\
                 This means waste of disk space, but no harm to data.\n{statistics}"
            )
        );
        let fixed = Report {
            leaks_fixed: 1,
            ..report()
        };
        assert_eq!(
            fixed.text(),
            format!(
                "The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n    0 corruptions\n\n\
                 Double checking the fixed image now...\nNo errors were found on the image.\n{statistics}"
            )
        );
        let corrupt = Report {
            corruptions: 2,
            ..report()
        };
        assert_eq!(
            corrupt.text(),
            format!(
                "\n2 errors were found on the image.\n\
                 Data may be corrupted, or further writes to the image may corrupt it.\n{statistics}"
            )
        );
    }

    #[test]
    fn exit_codes_are_those_of_qemu_img() {
        let code = |leaks, corruptions| {
            let report = Report {
                leaks,
                corruptions,
                ..report()
            };
            format!("{:?}", report.code())
        };
        let expected = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(code(0, 0), expected(0));
        assert_eq!(code(1, 0), expected(3));
        assert_eq!(code(0, 1), expected(2));
        assert_eq!(code(1, 1), expected(2));
    }

    #[test]
    fn zero_valued_fields_are_left_out() {
        let value = serde_json::to_value(report()).unwrap();
        let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        assert_eq!(
            keys,
            [
                "allocated-clusters",
                "check-errors",
                "filename",
                "format",
                "image-end-offset",
                "total-clusters"
            ]
        );
    }
}

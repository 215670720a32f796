//! `urus create`, as `qemu-img create`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use urus::{Compression, CreateOptions, Format, InfoOptions};

use crate::common::FormatArg;
use crate::failure::{Failure, Outcome};
use crate::option_list;
use crate::output::{complain, print};
use crate::size::Size;

/// Create an image
///
/// Takes qemu-img create's flags and prints what it prints. A file that exists is overwritten, as qemu-img does, unless it is in
/// use. The format of a backing file has to be given: it is never guessed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    format: FormatArg,

    /// Options of the format, key=value[,key=value…]; `-o help` lists them
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Backing file, by the name to record: a relative one is relative to the directory of the new image
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,

    /// Format of the backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    backing_format: Option<String>,

    /// Do not open the backing file; the size has to be given then
    #[arg(short = 'u')]
    unsafe_backing: bool,

    /// Print errors only
    #[arg(short, long)]
    quiet: bool,

    /// The new image
    pub(crate) file: Option<PathBuf>,

    /// Size of the virtual disk: bytes, or a number with k, M, G, T, P or E (8G, 1.5T); taken from the backing file when omitted
    #[arg(allow_negative_numbers = true)]
    size: Option<Size>,
}

const QCOW2_HELP: &str = "\
Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression (zlib, zstd)
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  preallocation=<str>    - Preallocation mode (allowed values: off)
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

const RAW_HELP: &str = "\
Supported raw options:
  preallocation=<str>    - Preallocation mode (allowed values: off)
  size=<size>            - Virtual disk size
";

/// What qemu-img can do and urus cannot, with what it is.
const NOT_YET: [(&str, &str); 6] = [
    ("data_file", "external data files"),
    ("data_file_raw", "external data files"),
    ("extended_l2", "extended L2 entries"),
    ("encryption", "encryption"),
    ("nocow", "switching copy-on-write off"),
    ("extent_size_hint", "extent size hints"),
];

pub(crate) fn run(args: Args) -> Outcome {
    if args
        .options
        .iter()
        .any(|options| options == "help" || options == "?")
    {
        print(match args.format {
            FormatArg::Qcow2 => QCOW2_HELP,
            FormatArg::Raw => RAW_HELP,
        });
        return Ok(ExitCode::SUCCESS);
    }
    let Some(file) = args.file else {
        // Exit code 1, as qemu-img's.
        return Err(Failure::new("create needs the name of the new image"));
    };
    let mut wanted = Wanted::new(args.format);
    for (key, value) in option_list::parse(&args.options).map_err(Failure::new)? {
        wanted.set(&key, &value).map_err(Failure::new)?;
    }
    if let Some(Size(size)) = args.size
        && wanted.size.replace(size).is_some()
    {
        return Err(Failure::new("The image size must be specified only once"));
    }
    if args.backing.is_some() {
        wanted.backing_file = args.backing;
    }
    if args.backing_format.is_some() {
        wanted.backing_format = args.backing_format;
    }
    wanted.open_backing = !args.unsafe_backing;

    let options = wanted.resolve(&file)?;
    if !args.quiet {
        print(&wanted.line(&file));
        warn_of_raw(&file, wanted.format);
    }
    urus::create(&file, &options)?;
    Ok(ExitCode::SUCCESS)
}

/// `urus create disk.qcow2 8G` makes a raw image, as qemu-img does. Nobody means that.
fn warn_of_raw(file: &Path, format: FormatArg) {
    let named_qcow2 = file
        .extension()
        .is_some_and(|extension| extension == "qcow2");
    if format == FormatArg::Raw && named_qcow2 {
        complain(&format!(
            "urus: {}: warning: this is a raw image, as qemu-img makes it where no format is given; for qcow2 say -f qcow2",
            file.display()
        ));
    }
}

/// All that was asked for, from `-o` and from flags.
#[derive(Debug)]
struct Wanted {
    format: FormatArg,
    size: Option<u64>,
    backing_file: Option<String>,
    backing_format: Option<String>,
    open_backing: bool,
    cluster_size: u64,
    /// As given.
    compat: Option<String>,
    version: u32,
    compression: Compression,
    lazy_refcounts: bool,
    refcount_bits: u32,
    preallocation: Option<String>,
}

impl Wanted {
    fn new(format: FormatArg) -> Self {
        Self {
            format,
            size: None,
            backing_file: None,
            backing_format: None,
            open_backing: true,
            cluster_size: 64 << 10,
            compat: None,
            version: 3,
            compression: Compression::Deflate,
            lazy_refcounts: false,
            refcount_bits: 16,
            preallocation: None,
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let bytes = || {
            value
                .parse::<Size>()
                .map(|size| size.0)
                .map_err(|error| format!("the option {key}: {error}"))
        };
        let of_qcow2 = self.format == FormatArg::Qcow2;
        match key {
            "size" => self.size = Some(bytes()?),
            "preallocation" => {
                if value != "off" {
                    return Err(format!(
                        "preallocation={value} is not supported yet: only preallocation=off is"
                    ));
                }
                self.preallocation = Some(value.to_owned());
            }
            "backing_file" if of_qcow2 => self.backing_file = Some(value.to_owned()),
            "backing_fmt" if of_qcow2 => self.backing_format = Some(value.to_owned()),
            "cluster_size" if of_qcow2 => self.cluster_size = bytes()?,
            "compat" if of_qcow2 => {
                self.version = match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => {
                        return Err(format!(
                            "compat={value}: the compatibility levels are 0.10 (v2) and 1.1 (v3)"
                        ));
                    }
                };
                self.compat = Some(value.to_owned());
            }
            "compression_type" if of_qcow2 => {
                self.compression = match value {
                    "zlib" => Compression::Deflate,
                    "zstd" => Compression::Zstd,
                    _ => return Err(format!("compression_type={value}: it is zlib or zstd")),
                };
            }
            "lazy_refcounts" if of_qcow2 => {
                self.lazy_refcounts = option_list::boolean(key, value)?;
            }
            "refcount_bits" if of_qcow2 => {
                self.refcount_bits = value
                    .parse()
                    .map_err(|_| format!("refcount_bits={value}: a number is needed"))?;
            }
            _ => return self.refuse(key, value),
        }
        Ok(())
    }

    fn refuse(&self, key: &str, value: &str) -> Result<(), String> {
        let feature = NOT_YET
            .iter()
            .find_map(|(name, feature)| (*name == key).then_some(*feature))
            .or_else(|| key.starts_with("encrypt.").then_some("encryption"));
        match feature {
            // What is off is off.
            Some(_) if value == "off" => Ok(()),
            Some(feature) => Err(format!(
                "{key}={value}: {feature} not supported yet: urus could not open the image; leave the option away"
            )),
            None => Err(format!(
                "Invalid parameter '{key}': `urus create -f {} -o help` lists the options",
                Format::from(self.format)
            )),
        }
    }

    /// The facade's options; the size is known from here on.
    fn resolve(&mut self, file: &Path) -> Result<CreateOptions, Failure> {
        let mut options = CreateOptions::new();
        options
            .format(self.format.into())
            .overwrite(true)
            .open_backing(self.open_backing);
        if let Some((name, format)) = self.backing(file)? {
            if self.size.is_none() && self.open_backing {
                let path = beside(file, &name);
                let info = urus::info(&path, InfoOptions::new().format(format))?;
                self.size = Some(info.virtual_size);
            }
            options.backing(name, format);
        }
        let Some(size) = self.size else {
            return Err(Failure::new("Image creation needs a size parameter"));
        };
        options.size(size);
        if self.format == FormatArg::Qcow2 {
            self.check_qcow2()?;
            options
                .cluster_bytes(self.cluster_size)
                .version(self.version)
                .compression(self.compression)
                .lazy_refcounts(self.lazy_refcounts)
                .refcount_bits(self.refcount_bits);
        }
        Ok(options)
    }

    /// What qemu-img says, where it says it well.
    fn check_qcow2(&self) -> Result<(), Failure> {
        let fail = |what: &str| Err(Failure::new(what));
        let because = |option: String, what: &str| Err(Failure::new(format!("{option}: {what}")));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return because(
                format!("cluster_size={}", self.cluster_size),
                "Cluster size must be a power of two between 512 and 2048k",
            );
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return because(
                format!("refcount_bits={}", self.refcount_bits),
                "Refcount width must be a power of two and may not exceed 64 bits",
            );
        }
        if self.version < 3 {
            if self.refcount_bits != 16 {
                return fail(
                    "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1)",
                );
            }
            if self.lazy_refcounts {
                return fail(
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1)",
                );
            }
            if self.compression != Compression::Deflate {
                return fail(
                    "Non-zlib compression type is only supported with compatibility level 1.1 and above (use compat=1.1)",
                );
            }
        }
        Ok(())
    }

    fn backing(&self, file: &Path) -> Result<Option<(String, Format)>, Failure> {
        let Some(name) = self.backing_file.as_deref().filter(|name| !name.is_empty()) else {
            return match self.backing_format {
                Some(_) => Err(Failure::new(
                    "Backing format cannot be used without backing file",
                )),
                None => Ok(None),
            };
        };
        if self.format == FormatArg::Raw {
            return Err(Failure::new(
                "Backing file not supported for file format 'raw'",
            ));
        }
        if is_same_file(file, &beside(file, name)) {
            return Err(Failure::new(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        let Some(format) = &self.backing_format else {
            return Err(Failure::new(
                "Backing file specified without backing format: give it with -F (it is never guessed)",
            ));
        };
        let format = Format::from_name(format).ok_or_else(|| {
            Failure::new(format!(
                "a backing file of format '{format}' is not supported: qcow2 and raw are"
            ))
        })?;
        Ok(Some((name.to_owned(), format)))
    }

    /// What qemu-img prints.
    fn line(&self, file: &Path) -> String {
        let size = self.size.unwrap_or(0);
        let mut text = format!(
            "Formatting '{}', fmt={}",
            file.display(),
            Format::from(self.format)
        );
        let mut add = |key: &str, value: &str| {
            text.push_str(&format!(" {key}={}", value.replace(',', ",,")));
        };
        let preallocation = self.preallocation.as_deref();
        if self.format == FormatArg::Raw {
            add("size", &size.to_string());
            if let Some(mode) = preallocation {
                add("preallocation", mode);
            }
        } else {
            add("cluster_size", &self.cluster_size.to_string());
            add("extended_l2", "off");
            if let Some(mode) = preallocation {
                add("preallocation", mode);
            }
            add("compression_type", &self.compression.to_string());
            add("size", &size.to_string());
            let given = [
                ("compat", self.compat.as_deref()),
                ("backing_file", self.backing_file.as_deref()),
                ("backing_fmt", self.backing_format.as_deref()),
            ];
            for (key, value) in given {
                if let Some(value) = value {
                    add(key, value);
                }
            }
            add(
                "lazy_refcounts",
                if self.lazy_refcounts { "on" } else { "off" },
            );
            add("refcount_bits", &self.refcount_bits.to_string());
        }
        text.push('\n');
        text
    }
}

/// A name as the image at `file` would record it, seen from here.
fn beside(file: &Path, name: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(name)
}

/// Whether both paths lead to one file: overwriting would destroy the backing file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    //! Guards which options are understood, and the line that is printed for them.
    use super::*;

    fn wanted(format: FormatArg, options: &[(&str, &str)]) -> Result<Wanted, String> {
        let mut wanted = Wanted::new(format);
        for (key, value) in options {
            wanted.set(key, value)?;
        }
        Ok(wanted)
    }

    #[test]
    fn options_are_understood() {
        let all = [
            ("size", "1.5G"),
            ("cluster_size", "4k"),
            ("compat", "v3"),
            ("compression_type", "zstd"),
            ("lazy_refcounts", "on"),
            ("refcount_bits", "64"),
            ("preallocation", "off"),
            ("extended_l2", "off"),
            ("backing_file", "a,b"),
            ("backing_fmt", "raw"),
        ];
        let wanted = wanted(FormatArg::Qcow2, &all).unwrap();
        assert_eq!(
            wanted.line(Path::new("x")),
            "Formatting 'x', fmt=qcow2 cluster_size=4096 extended_l2=off preallocation=off compression_type=zstd \
             size=1610612736 compat=v3 backing_file=a,,b backing_fmt=raw lazy_refcounts=on refcount_bits=64\n"
        );
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (key, value, says) in [
            ("preallocation", "full", "preallocation=full"),
            ("extended_l2", "on", "extended L2"),
            ("data_file", "x", "external data files"),
            ("encrypt.format", "luks", "encryption"),
            ("nosuch", "1", "Invalid parameter 'nosuch'"),
            ("compat", "9", "compat=9"),
            ("cluster_size", "big", "cluster_size"),
            ("refcount_bits", "x", "refcount_bits=x"),
            ("compression_type", "lzo", "compression_type=lzo"),
        ] {
            let error = wanted(FormatArg::Qcow2, &[(key, value)]).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert!(wanted(FormatArg::Raw, &[("cluster_size", "64k")]).is_err());
        assert!(wanted(FormatArg::Raw, &[("preallocation", "off")]).is_ok());
    }

    #[test]
    fn combinations_are_checked() {
        for options in [
            &[("cluster_size", "100")][..],
            &[("cluster_size", "4M")],
            &[("refcount_bits", "3")],
            &[("refcount_bits", "128")],
            &[("compat", "0.10"), ("refcount_bits", "8")],
            &[("compat", "v2"), ("lazy_refcounts", "on")],
            &[("compat", "v2"), ("compression_type", "zstd")],
        ] {
            let wanted = wanted(FormatArg::Qcow2, options).unwrap();
            assert!(wanted.check_qcow2().is_err(), "{options:?}");
        }
    }
}

//! Chains: damaged layers one behind another, and names of backing files that lead where they must not.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use urus::{BackingPolicy, Format, IoDriver, OpenOptions};
use urus_format::{BackingName, Header, create};
use urus_sim::image::backing_name;

use crate::Verdict;
use crate::input::Input;
use crate::mutate::mutated;
use crate::operate::{Layer, Session, Way, on_disk, options};
use crate::require;
use crate::view::look;

/// Layers of a chain, at most.
const MOST_LAYERS: u8 = 4;

/// Opens a chain and uses it, or opens an image whose names are not to be trusted.
///
/// # Errors
/// What is wrong.
pub fn chain(data: &[u8]) -> Verdict {
    let mut input = Input::new(data);
    match input.u8() {
        shape if shape & 1 == 0 => layers(shape >> 1, &mut input),
        shape => names(shape >> 1, &mut input),
    }
}

/// Two to four layers, each damaged, the last of them maybe raw.
fn layers(shape: u8, input: &mut Input<'_>) -> Verdict {
    let way = Way::read(input);
    let count = 2 + shape % (MOST_LAYERS - 1);
    let raw_last = shape & 0x10 != 0;
    let mut chain = Vec::new();
    let mut first = None;
    let mut changes = 0;
    for number in 0..count {
        let image = mutated(input);
        let last = number + 1 == count;
        let mut file = on_disk(&image.base.files[0], image.bytes);
        if number > 0 {
            file = file.read_only();
        } else {
            first = Some(image.base.clone());
        }
        if last && raw_last {
            chain.push(Layer { file, header: None });
            continue;
        }
        changes += image.changes;
        let bytes = &mut file.contents;
        let Ok(mut header) = Header::parse(bytes, bytes.len() as u64) else {
            return Ok(());
        };
        // Whether a layer has one below is the chain's to say.
        header.backing = (!last).then(|| backing_name("base", "qcow2"));
        let Ok(encoded) = header.encode() else {
            return Ok(());
        };
        let Some(place) = bytes.get_mut(..encoded.len()) else {
            return Ok(());
        };
        place.copy_from_slice(&encoded);
        chain.push(Layer {
            file,
            header: Some(header),
        });
    }
    // From the last to the second: what the image stands on, where all of that is sound.
    let mut behind: Option<Vec<u8>> = None;
    let mut known = true;
    for layer in chain[1..].iter().rev() {
        let bytes = &layer.file.contents;
        let shown = match &layer.header {
            None => Some(bytes[..bytes.len() & !511].to_vec()),
            Some(header) => {
                let view = look(bytes, behind.as_deref());
                let size = usize::try_from(header.size & !511).unwrap_or(usize::MAX);
                let sound = view.is_sound();
                view.guest.filter(|_| sound).map(|mut guest| {
                    guest.truncate(size);
                    guest
                })
            }
        };
        known &= shown.is_some();
        behind = shown;
    }
    let Some(base) = first else { return Ok(()) };
    let session = Session {
        name: base.name,
        behind: behind.as_deref().filter(|_| known),
        valid: changes == 0 && known && base.behind.is_some(),
        options: options(&base, way),
    };
    session.run(chain, way, input)
}

/// What no image may show: it lies outside the directory that is allowed.
const SECRET: &[u8] = b"none of the image's business.   ";

/// A directory that is allowed, with something beside it that is not.
struct Place {
    root: TempDir,
}

thread_local! {
    static PLACE: std::io::Result<Place> = Place::new();
}

impl Place {
    fn new() -> std::io::Result<Self> {
        let root = tempfile::tempdir()?;
        let allowed = root.path().join("allowed");
        std::fs::create_dir_all(allowed.join("sub"))?;
        std::fs::create_dir(root.path().join("secret"))?;
        let secret = root.path().join("secret/raw");
        std::fs::write(&secret, SECRET.repeat(2048))?;
        std::fs::write(allowed.join("raw"), vec![0x11; 65536])?;
        std::fs::write(allowed.join("sub/raw"), vec![0x22; 65536])?;
        std::fs::write(allowed.join("qcow2"), image_bytes(None))?;
        std::os::unix::fs::symlink("../secret/raw", allowed.join("link"))?;
        std::os::unix::fs::symlink("sub/raw", allowed.join("inner"))?;
        std::os::unix::fs::symlink(&secret, allowed.join("absolute"))?;
        Ok(Self { root })
    }

    fn allowed(&self) -> PathBuf {
        self.root.path().join("allowed")
    }
}

/// An empty image of 64 KiB.
fn image_bytes(backing: Option<BackingName>) -> Vec<u8> {
    let options = create::CreateOptions {
        cluster_bits: 12,
        backing,
        ..create::CreateOptions::new(65536)
    };
    let Ok(new) = create::layout(&options) else {
        return Vec::new();
    };
    let mut bytes = vec![0; usize::try_from(new.file_bytes).unwrap_or(0)];
    for (offset, part) in new.writes {
        let at = usize::try_from(offset).unwrap_or(0);
        bytes[at..at + part.len()].copy_from_slice(&part);
    }
    bytes
}

/// A name out of pieces that mean something.
fn name(place: &Place, input: &mut Input<'_>) -> Vec<u8> {
    let allowed = place.allowed();
    let mut name = Vec::new();
    for _ in 0..1 + input.u8() % 8 {
        let piece: &[u8] = match input.u8() % 24 {
            0 => b"..",
            1 | 2 => b"/",
            3 => b"secret",
            4 | 5 => b"raw",
            6 => b"qcow2",
            7 => b"sub",
            8 => b"link",
            9 => b"inner",
            10 => b"absolute",
            11 => b"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"../secret/raw\"}}",
            12 => b"fd:",
            13 => b"nbd://localhost/",
            14 => b"/proc/self/fd/",
            15 => b"/proc/self/cwd/",
            16 => b"image",
            17 => b".",
            18 => b"/dev/fd/0",
            19 => allowed.as_os_str().as_encoded_bytes(),
            20 => place.root.path().as_os_str().as_encoded_bytes(),
            21 => b"second",
            22 => {
                let len = usize::from(input.u8() % 16);
                input.take(len)
            }
            _ => b"x",
        };
        name.extend_from_slice(piece);
    }
    name.truncate(1023);
    name
}

fn backing(place: &Place, input: &mut Input<'_>) -> Option<BackingName> {
    let format = match input.u8() % 8 {
        0 => None,
        1..=3 => Some("raw".to_owned()),
        4..=6 => Some("qcow2".to_owned()),
        _ => Some("vmdk".to_owned()),
    };
    Some(BackingName {
        name: name(place, input),
        format,
    })
}

/// Real files, opened as a user would: nothing outside the allowed directory is ever opened.
fn names(shape: u8, input: &mut Input<'_>) -> Verdict {
    PLACE.with(|place| {
        let place = place
            .as_ref()
            .map_err(|error| format!("no scratch directory: {error}"))?;
        let allowed = place.allowed();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(allowed.join(name), bytes).map_err(|error| format!("{name}: {error}"))
        };
        write("image", &image_bytes(backing(place, input)))?;
        write("second", &image_bytes(backing(place, input)))?;
        let mut options = OpenOptions::new();
        options
            .io(IoDriver::Blocking)
            .lock(shape & 2 != 0)
            .read_only(shape & 1 != 0)
            .backing_format(Format::Raw);
        let forbidden = match shape >> 2 & 3 {
            0 => {
                options.backing(BackingPolicy::Forbid);
                true
            }
            1 => {
                options.backing(BackingPolicy::Dir(allowed.clone()));
                false
            }
            _ => false,
        };
        let Ok(device) = options.open(allowed.join("image")) else {
            return Ok(());
        };
        let layers = device.layers().to_vec();
        let result = inspect(&device, &allowed, &layers, forbidden);
        device
            .close()
            .map_err(|error| format!("it does not close: {error}"))?;
        result
    })
}

fn inspect(
    device: &urus::Device,
    allowed: &Path,
    layers: &[urus::Layer],
    forbidden: bool,
) -> Verdict {
    require!(
        !forbidden || layers.len() == 1,
        "backing files are forbidden, and {layers:?} were opened"
    );
    let allowed = allowed.canonicalize().map_err(|error| error.to_string())?;
    for layer in layers {
        let real = layer
            .path
            .canonicalize()
            .map_err(|error| error.to_string())?;
        require!(real.starts_with(&allowed), "{} was opened", real.display());
    }
    let mut bytes = vec![0; 65536];
    let mut io = device.blocking().map_err(|error| error.to_string())?;
    if io.read_at(&mut bytes, 0).is_ok() {
        require!(
            !bytes.chunks(SECRET.len()).any(|piece| piece == SECRET),
            "the disk shows what lies outside, through {layers:?}"
        );
    }
    Ok(())
}

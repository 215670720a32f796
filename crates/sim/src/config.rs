//! What is simulated: the image, the chain, the device's options and the machine's behaviour.

use urus_engine::storage::FileId;
use urus_engine::{LayerFormat, LayerSpec, Options};
use urus_format::{Header, create};

use crate::rng::Rng;
use crate::stamp::Content;
use crate::world::{FileSpec, SimConfig};

/// One configuration. Everything else of a run comes from its seed.
#[derive(Clone, Debug)]
pub struct Config {
    /// For the tables.
    pub name: &'static str,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the refcount width.
    pub refcount_order: u32,
    /// Size of the virtual disk in sectors.
    pub sectors: u64,
    /// Queues.
    pub queues: usize,
}

/// A device's files before the first request.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// The image first, then its backing files.
    pub files: Vec<FileSpec>,
    /// What the guest reads.
    pub initial: Vec<Content>,
}

impl Config {
    /// Makes the files.
    #[must_use]
    pub fn fixture(&self, _rng: &mut Rng) -> Fixture {
        let options = create::CreateOptions {
            cluster_bits: self.cluster_bits,
            version: self.version,
            refcount_order: self.refcount_order,
            ..create::CreateOptions::new(self.sectors * 512)
        };
        let image = create::layout(&options).expect("configurations are valid");
        let mut bytes = vec![0; crate::contents::index(image.file_bytes)];
        for (offset, part) in image.writes {
            let at = crate::contents::index(offset);
            bytes[at..at + part.len()].copy_from_slice(&part);
        }
        Fixture {
            files: vec![FileSpec::new(bytes)],
            initial: vec![Content::Zero; crate::contents::index(self.sectors)],
        }
    }

    /// The engine's options.
    #[must_use]
    pub fn options(&self) -> Options {
        Options::default()
    }

    /// How the machine behaves.
    #[must_use]
    pub fn behaviour(&self, rng: &mut Rng) -> SimConfig {
        SimConfig::random(rng)
    }
}

/// The chain, from the files' bytes.
///
/// # Errors
/// What is wrong with the header.
pub fn layers(files: &[&[u8]]) -> Result<Vec<LayerSpec>, String> {
    let mut layers = Vec::new();
    for (number, bytes) in (0..).zip(files) {
        let header = Header::parse(bytes, bytes.len() as u64).map_err(|error| error.to_string())?;
        layers.push(LayerSpec {
            file: FileId(number),
            name: format!("file {number}"),
            format: LayerFormat::Qcow2(Box::new(header)),
        });
    }
    Ok(layers)
}

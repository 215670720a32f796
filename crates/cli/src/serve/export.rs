//! What `urus serve` exports over NBD besides the first image, under which names, and to whom.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use urus::{Device, Prepared};
use urus_listen::Listen;
use urus_nbd::{ServerBuilder, TlsCredentials};

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// The NBD export's name; clients that ask for no name get this image whatever its name [default: the empty name]
    #[arg(
        short = 'x',
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub(super) export_name: String,

    /// One more image, as an NBD export of that name; may be given several times. All options hold for all images
    #[arg(long = "image", value_name = "NAME=PATH", value_parser = named_image)]
    images: Vec<NamedImage>,

    /// Serve NBD over TLS only, with QEMU's files in this directory: server-cert.pem, server-key.pem (and ca-cert.pem, ca-crl.pem)
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,

    /// Serve only clients with a certificate that DIR/ca-cert.pem has signed
    #[arg(long, requires = "tls_creds")]
    tls_verify_peer: bool,

    /// NBD clients at once; more are turned away. Each can make the server hold some 64M, and has an
    /// open file: where the limit of those is too low (ulimit -n), fewer are taken
    #[arg(short = 'e', long, visible_alias = "shared", value_name = "N", default_value_t = 128,
          value_parser = connections)]
    max_connections: u16,

    /// What clients may show to people about the first image
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
}

/// qemu-nbd's 0 is as many as can be.
fn connections(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) => Ok(u16::MAX),
        Ok(connections) => Ok(connections),
        Err(_) => Err("expected a number from 1 to 65535, or 0 for as many as can be".into()),
    }
}

#[derive(Clone, Debug)]
struct NamedImage {
    name: String,
    path: PathBuf,
}

fn named_image(text: &str) -> Result<NamedImage, String> {
    match text.split_once('=') {
        Some((name, path)) if !path.is_empty() => Ok(NamedImage {
            name: name.into(),
            path: path.into(),
        }),
        _ => Err("give NAME=PATH".into()),
    }
}

/// Another image, open.
pub(super) struct Other {
    pub(super) name: String,
    pub(super) device: Device,
}

impl Other {
    /// For people.
    pub(super) fn describe(&self) -> String {
        let size = crate::size::human(self.device.size());
        format!("{:?}: {}, {size}", self.name, self.device.name())
    }
}

impl ExportArgs {
    /// Their files.
    pub(super) fn other_images(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.images
            .iter()
            .map(|image| (image.name.as_str(), image.path.as_path()))
    }

    /// Opens their files.
    pub(super) fn prepare_others(
        &self,
        prepare: impl Fn(&Path) -> Result<Prepared, Failure>,
    ) -> Result<Vec<(String, Prepared)>, Failure> {
        let prepare = |image: &NamedImage| Ok((image.name.clone(), prepare(&image.path)?));
        self.images.iter().map(prepare).collect()
    }

    /// Reads the credentials, so that a wrong file is told before an image is opened.
    pub(super) fn credentials(&self) -> Result<Option<TlsCredentials>, Failure> {
        let read = |dir| TlsCredentials::from_directory(dir, self.tls_verify_peer);
        Ok(self.tls_creds.as_ref().map(read).transpose()?)
    }

    /// What is asked of clients; None without TLS.
    pub(super) fn tls_text(&self) -> Option<&'static str> {
        self.tls_creds.as_ref()?;
        Some(if self.tls_verify_peer {
            "required, with a certificate"
        } else {
            "required"
        })
    }

    pub(super) fn max_connections(&self) -> u64 {
        self.max_connections.into()
    }

    pub(super) fn configure(
        &self,
        mut builder: ServerBuilder,
        others: &[Other],
        credentials: Option<TlsCredentials>,
    ) -> ServerBuilder {
        builder = builder.export_name(&self.export_name);
        if let Some(description) = &self.description {
            builder = builder.description(description);
        }
        if let Some(credentials) = credentials {
            builder = builder.tls(credentials);
        }
        for other in others {
            builder = builder
                .export(other.device.clone())
                .export_name(&other.name);
        }
        builder
    }
}

/// Starts them.
pub(super) fn start_others(others: Vec<(String, Prepared)>) -> Result<Vec<Other>, Failure> {
    let start = |(name, prepared): (String, Prepared)| {
        let device = prepared.start()?;
        Ok(Other { name, device })
    };
    others.into_iter().map(start).collect()
}

/// Sockets that a service manager has passed (`LISTEN_FDS`).
pub(super) fn passed_sockets() -> Result<Vec<Listen>, Failure> {
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for index in 0..passed.len() {
        let socket = match passed.take_unix_listener(index) {
            Ok(socket) => socket.map(OwnedFd::from),
            Err(_) => passed
                .take_tcp_listener(index)
                .map_err(|error| {
                    let number = index + 3;
                    Failure::new(format!(
                        "descriptor {number}, passed with LISTEN_FDS, is not a listening stream socket: {error}"
                    ))
                })?
                .map(OwnedFd::from),
        };
        sockets.extend(socket.map(Listen::Fd));
    }
    Ok(sockets)
}

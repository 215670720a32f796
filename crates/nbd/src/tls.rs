//! Credentials for TLS, as QEMU's `tls-creds-x509` lays them out in a directory.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::Error;

/// What a server needs to speak TLS: its certificate and key, and whom it believes.
#[derive(Clone)]
pub struct TlsCredentials {
    pub(crate) config: Arc<ServerConfig>,
}

impl fmt::Debug for TlsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsCredentials").finish_non_exhaustive()
    }
}

impl TlsCredentials {
    /// Reads PEM files with QEMU's names from `directory`: `server-cert.pem` (the certificate, then any between it and the authority's),
    /// `server-key.pem`, and with `verify_peer`, `ca-cert.pem` and `ca-crl.pem` if it is there.
    ///
    /// With `verify_peer` a client has to present a certificate that one of `ca-cert.pem` has signed. Without, any client that can
    /// connect is served: the connection is encrypted, and nobody knows to whom.
    ///
    /// # Errors
    /// [`Error::Tls`] for a file that is missing, is not what its name says, or does not go with the others.
    pub fn from_directory(directory: impl AsRef<Path>, verify_peer: bool) -> Result<Self, Error> {
        let at = |name: &str| directory.as_ref().join(name);
        let provider = Arc::new(ring::default_provider());
        let certificate = at("server-cert.pem");
        let chain = CertificateDer::pem_file_iter(&certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .and_then(some)
            .map_err(unreadable(&certificate, "a certificate"))?;
        let key_path = at("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&key_path)
            .map_err(unreadable(&key_path, "a private key"))?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable(&certificate))?;
        let builder = if verify_peer {
            let authorities = at("ca-cert.pem");
            let mut verifier = WebPkiClientVerifier::builder_with_provider(
                Arc::new(roots(&authorities)?),
                provider,
            );
            let revoked = at("ca-crl.pem");
            if revoked.exists() {
                let lists = CertificateRevocationListDer::pem_file_iter(&revoked)
                    .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                    .and_then(some)
                    .map_err(unreadable(&revoked, "a list of revoked certificates"))?;
                // An authority without a list has revoked nothing, as QEMU takes it.
                verifier = verifier.with_crls(lists).allow_unknown_revocation_status();
            }
            let verifier = verifier.build().map_err(unusable(&authorities))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(unusable(&certificate))?;
        Ok(Self {
            config: Arc::new(config),
        })
    }
}

fn roots(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(some)
        .map_err(unreadable(path, "an authority's certificate"))?;
    for certificate in certificates {
        roots.add(certificate).map_err(unusable(path))?;
    }
    Ok(roots)
}

/// A PEM file without what it is for is as bad as none.
fn some<T>(list: Vec<T>) -> Result<Vec<T>, pem::Error> {
    if list.is_empty() {
        Err(pem::Error::NoItemsFound)
    } else {
        Ok(list)
    }
}

fn unreadable(path: &Path, wanted: &'static str) -> impl FnOnce(pem::Error) -> Error {
    let path = PathBuf::from(path);
    move |error| Error::Tls {
        path,
        what: match error {
            pem::Error::Io(error) => format!("cannot read {wanted}: {error}"),
            pem::Error::NoItemsFound => format!("does not hold {wanted} in PEM form"),
            error => format!("cannot read {wanted}: {error}"),
        },
    }
}

fn unusable<E: fmt::Display>(path: &Path) -> impl FnOnce(E) -> Error {
    let path = PathBuf::from(path);
    move |error| Error::Tls {
        path,
        what: format!("cannot be used: {error}"),
    }
}

//! Metrics of a server for Prometheus, over HTTP (docs/METRICS.md). `text` is what is said, `request` what is answered to whom, `server` to several
//! clients at once.

mod request;
mod server;
mod text;

use std::path::Path;

use urus_listen::{Listen, Listener};

pub(crate) use server::Metrics;
pub(crate) use text::Sources;

use crate::failure::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct MetricsArgs {
    /// Answer Prometheus here (GET /metrics): unix:PATH or HOST:PORT. Tells the image's path, but nothing of its content. A socket that a killed
    /// server has left is replaced
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<String>,
}

impl MetricsArgs {
    /// The socket's path, if one is wanted.
    pub(crate) fn path(&self) -> Option<&Path> {
        let text = self.metrics.as_deref()?;
        let path = text.strip_prefix("unix:");
        path.or(text.contains('/').then_some(text)).map(Path::new)
    }

    /// Listens, so that an address that is taken costs nothing. Scrapers wait until the server starts.
    pub(crate) fn bind(&self) -> Result<Option<Listener>, Failure> {
        let Some(text) = &self.metrics else {
            return Ok(None);
        };
        let address: Listen = text
            .parse()
            .map_err(|error| Failure::usage(format!("--metrics: {error}")))?;
        Ok(Some(Listener::bind_replacing_stale(address)?))
    }
}

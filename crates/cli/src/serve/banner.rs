//! What a server says at its start.

use std::fmt::Write as _;

use urus::Device;
use urus_nbd::Server;

use super::Args;
use super::export::Other;
use crate::size::human;

pub(super) fn print(args: &Args, device: &Device, others: &[Other], server: &Server) {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = describe(&mut text, args, device)
        .and_then(|()| exports(&mut text, others))
        .and_then(|()| addresses(&mut text, server))
        .and_then(|()| match args.export.tls_text() {
            // Each client has its own way to name its certificates.
            Some(tls) => writeln!(text, "  TLS       {tls}"),
            None => examples(&mut text, &server.uris()),
        });
    crate::output::print(&text);
}

fn describe(out: &mut String, args: &Args, device: &Device) -> std::fmt::Result {
    let access = if device.read_only() {
        "read-only"
    } else {
        "read-write"
    };
    writeln!(
        out,
        "{}: serving {} ({} bytes), {}, {access}",
        args.image.display(),
        human(device.size()),
        device.size(),
        device.format()
    )?;
    if let Some(bytes) = device.cluster_bytes() {
        writeln!(out, "  clusters  {}", human(bytes))?;
    }
    for layer in &device.layers()[1..] {
        writeln!(
            out,
            "  backing   {} ({})",
            layer.path.display(),
            layer.format
        )?;
    }
    writeln!(
        out,
        "  I/O       {}, cache {}, discard {}",
        device.driver(),
        args.cache.name(),
        args.discard.name()
    )?;
    let queues = args.queues();
    let plural = if queues == 1 { "queue" } else { "queues" };
    writeln!(
        out,
        "  queues    {queues} {plural} of {} requests",
        args.queue_size
    )
}

fn exports(out: &mut String, others: &[Other]) -> std::fmt::Result {
    for other in others {
        writeln!(out, "  export    {}", other.describe())?;
    }
    Ok(())
}

fn addresses(out: &mut String, server: &Server) -> std::fmt::Result {
    for address in server.addresses() {
        writeln!(out, "  listening {address}")?;
    }
    Ok(())
}

fn examples(out: &mut String, uris: &[String]) -> std::fmt::Result {
    let Some(uri) = uris.first() else {
        return Ok(());
    };
    let uri = quoted(uri);
    writeln!(out, "\nTo paste:")?;
    writeln!(out, "  nbdcopy --progress {uri} copy.raw")?;
    writeln!(
        out,
        "  qemu-img convert -p -f raw -O qcow2 {uri} copy.qcow2"
    )?;
    writeln!(
        out,
        "  fio --name=urus --ioengine=nbd --uri={uri} --rw=randread --bs=4k --iodepth=32 --time_based --runtime=10"
    )?;
    writeln!(out, "\nCtrl-C or SIGTERM ends it cleanly.")
}

/// For a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

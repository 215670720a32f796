//! What a server says at its start.

use std::fmt::Write as _;

use urus::Device;

use super::export::Other;
use super::{Args, Servers};
use crate::metrics::Metrics;
use crate::size::human;

pub(super) fn print(
    args: &Args,
    device: &Device,
    others: &[Other],
    servers: &Servers,
    metrics: Option<&Metrics>,
) {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = describe(&mut text, args, device, others)
        .and_then(|()| exports(&mut text, others))
        .and_then(|()| addresses(&mut text, servers))
        .and_then(|()| match args.control.path() {
            Some(path) => writeln!(text, "  control   unix:{}", path.display()),
            None => Ok(()),
        })
        .and_then(|()| {
            let mut addresses = metrics.into_iter().flat_map(Metrics::addresses);
            addresses.try_for_each(|address| writeln!(text, "  metrics   {address}"))
        })
        .and_then(|()| match args.export.tls_text() {
            // Each client has its own way to name its certificates.
            Some(tls) => writeln!(text, "  TLS       {tls}"),
            None => examples(&mut text, servers),
        });
    crate::output::print(&text);
}

/// What does the I/O: of every queue, since each has a ring of its own and may have got none.
fn io_text(device: &Device, others: &[Other]) -> String {
    let mut rings = 0;
    let mut blocking = 0;
    for device in std::iter::once(device).chain(others.iter().map(|other| &other.device)) {
        let queues = device.statistics().queues;
        let queues = queues.iter().filter_map(|queue| queue.driver);
        for driver in queues.chain([device.driver()]) {
            if driver == "io_uring" {
                rings += 1;
            } else {
                blocking += 1;
            }
        }
    }
    match (rings, blocking) {
        (_, 0) => "io_uring".to_owned(),
        (0, _) => "blocking".to_owned(),
        // The device's own thread counts too.
        _ => format!(
            "blocking on {blocking} of {} threads, for want of io_uring there",
            rings + blocking
        ),
    }
}

fn describe(out: &mut String, args: &Args, device: &Device, others: &[Other]) -> std::fmt::Result {
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
    if let Some(directory) = args.snapshot_directory() {
        writeln!(
            out,
            "  snapshot  what is written goes to {}, and is gone at the end",
            directory.display()
        )?;
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
        io_text(device, others),
        args.cache().name(),
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

fn addresses(out: &mut String, servers: &Servers) -> std::fmt::Result {
    for address in servers.nbd.iter().flat_map(|server| server.addresses()) {
        writeln!(out, "  listening {address}")?;
    }
    for path in servers.vhost_user.iter().filter_map(|server| server.path()) {
        writeln!(out, "  listening {} (vhost-user-blk)", path.display())?;
    }
    Ok(())
}

fn examples(out: &mut String, servers: &Servers) -> std::fmt::Result {
    let uris = servers.nbd.iter().flat_map(|server| server.uris());
    let uri = uris.into_iter().next();
    let socket = servers.vhost_user.as_ref().and_then(|server| server.path());
    if uri.is_none() && socket.is_none() {
        return Ok(());
    }
    writeln!(out, "\nTo paste:")?;
    if let Some(socket) = socket {
        let socket = quoted(&format!(
            "socket,id=urus,reconnect=1,path={}",
            socket.display()
        ));
        writeln!(
            out,
            "  qemu-system-x86_64 ... -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem \\\n    \
             -chardev {socket} -device vhost-user-blk-pci,chardev=urus"
        )?;
    }
    if let Some(uri) = uri {
        nbd_examples(out, &quoted(&uri))?;
    }
    writeln!(out, "\nCtrl-C or SIGTERM ends it cleanly.")
}

fn nbd_examples(out: &mut String, uri: &str) -> std::fmt::Result {
    writeln!(out, "  nbdcopy --progress {uri} copy.raw")?;
    writeln!(
        out,
        "  qemu-img convert -p -f raw -O qcow2 {uri} copy.qcow2"
    )?;
    writeln!(
        out,
        "  fio --name=urus --ioengine=nbd --uri={uri} --rw=randread --bs=4k --iodepth=32 --time_based --runtime=10"
    )
}

/// For a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

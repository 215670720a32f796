//! Serves an image until a line is read: `cargo run -p urus-nbd --example serve -- disk.qcow2 unix:disk.sock [QUEUES]`.

use urus_nbd::Server;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "IMAGE unix:PATH|HOST:PORT [QUEUES]";
    let image = arguments.next().ok_or(usage)?;
    let listen = arguments.next().ok_or(usage)?.parse()?;
    let queues = arguments.next().map_or(Ok(1), |count| count.parse())?;

    let device = urus::OpenOptions::new().open(image)?;
    let server = Server::builder(device.clone())
        .queues(queues)
        .listen(listen)
        .start()?;
    for uri in server.uris() {
        println!("nbdinfo '{uri}'");
    }
    std::io::stdin().read_line(&mut String::new())?;
    server.shutdown()?;
    device.close()?;
    Ok(())
}

//! The shortest useful program: copies what an image holds to a raw file, leaving holes where it reads as zeroes.
//!
//! `cargo run --release --example copy -- disk.qcow2 disk.raw`

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;

use urus::OpenOptions;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(image), Some(target), None) = (args.next(), args.next(), args.next()) else {
        return Err("usage: copy IMAGE RAW-FILE".into());
    };
    let device = OpenOptions::new().read_only(true).open(image)?;
    let target = File::create(target)?;
    target.set_len(device.size())?;

    let mut io = device.blocking()?;
    let mut bytes = vec![0; 4 << 20];
    let mut offset = 0;
    while offset < device.size() {
        for extent in io.block_status(offset, device.size() - offset)? {
            let end = extent.start + extent.len;
            while !extent.zero && offset < end {
                let len = bytes.len().min(usize::try_from(end - offset)?);
                io.read_at(&mut bytes[..len], offset)?;
                target.write_all_at(&bytes[..len], offset)?;
                offset += len as u64;
            }
            offset = end;
        }
    }
    target.sync_all()?;
    device.close()?;
    Ok(())
}

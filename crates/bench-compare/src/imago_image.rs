//! imago: asynchronous, with its driver for files, on a runtime of one thread.

use imago::file::File;
use imago::io_buffers::IoBuffer;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage, StorageOpenOptions};

use crate::contender::{Clock, Orders, Plan, lanes};

const ALIGNMENT: usize = 4096;

pub(crate) fn serve(plan: &Plan, orders: &Orders) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(text)?;
    runtime.block_on(async {
        let options = StorageOpenOptions::new()
            .filename(&plan.path)
            .write(plan.writes)
            .direct(plan.direct);
        let file = File::open(options).await.map_err(text)?;
        let image = Qcow2::<File>::builder(file)
            .write(plan.writes)
            .open(DenyImplicitOpenGate::default())
            .await
            .map_err(text)?;
        let image = FormatAccess::new(image);
        while let Some(seed) = orders.next() {
            let lane = |number, clock| lane(plan, &image, number, seed, clock);
            orders.answer(lanes(plan, lane).await);
        }
        image.flush().await.map_err(text)
    })
}

async fn lane(
    plan: &Plan,
    image: &FormatAccess<File>,
    number: u16,
    seed: u64,
    clock: Clock,
) -> Result<u64, String> {
    let mut buffer = IoBuffer::new(plan.block_bytes, ALIGNMENT).map_err(text)?;
    buffer.as_mut().into_slice().fill(b'w');
    let mut places = plan.places(number, seed);
    let mut operations = 0;
    loop {
        let offset = places.next();
        if plan.writes {
            image.write(&buffer, offset).await.map_err(text)?;
        } else {
            image.read(&mut buffer, offset).await.map_err(text)?;
        }
        operations += 1;
        if clock.is_over(operations) {
            return Ok(operations);
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    format!("imago: {error}")
}

//! qcow2-rs: asynchronous, over tokio-uring.

use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::uring::Qcow2IoUring;
use qcow2_rs::utils::qcow2_setup_dev_uring;

use crate::contender::{Clock, Orders, Plan, lanes};

/// Of 512 bytes: what it aligns to.
const BLOCK_BITS: u8 = 9;

pub(crate) fn serve(plan: &Plan, orders: &Orders) -> Result<(), String> {
    tokio_uring::start(async {
        // Its own sizes of caches, which hold the whole mapping.
        let parameters = Qcow2DevParams::new(BLOCK_BITS, None, None, !plan.writes, plan.direct);
        let device = qcow2_setup_dev_uring(&plan.path, &parameters)
            .await
            .map_err(text)?;
        while let Some(seed) = orders.next() {
            let lane = |number, clock| lane(plan, &device, number, seed, clock);
            orders.answer(lanes(plan, lane).await);
        }
        device.flush_meta().await.map_err(text)
    })
}

async fn lane(
    plan: &Plan,
    device: &Qcow2Dev<Qcow2IoUring>,
    number: u16,
    seed: u64,
    clock: Clock,
) -> Result<u64, String> {
    let mut buffer = Qcow2IoBuf::<u8>::new(plan.block_bytes);
    buffer.fill(b'w');
    let mut places = plan.places(number, seed);
    let mut operations = 0;
    loop {
        let offset = places.next();
        if plan.writes {
            device.write_at(&buffer, offset).await.map_err(text)?;
        } else {
            let bytes = device.read_at(&mut buffer, offset).await.map_err(text)?;
            if bytes != plan.block_bytes {
                return Err(text(format!("{bytes} bytes were read")));
            }
        }
        operations += 1;
        if clock.is_over(operations) {
            return Ok(operations);
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    format!("qcow2-rs: {error}")
}

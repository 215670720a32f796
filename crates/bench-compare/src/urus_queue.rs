//! urus: a queue with a buffer for each request in flight.

use std::time::Instant;

use urus::{Buffer, CacheMode, OpenOptions, Queue, Request};

use crate::contender::{Orders, Plan, Slice};

pub(crate) fn serve(plan: &Plan, orders: &Orders) -> Result<(), String> {
    let cache = if plan.direct {
        CacheMode::None
    } else {
        CacheMode::Writeback
    };
    let image = OpenOptions::new()
        .read_only(!plan.writes)
        .cache(cache)
        .open(&plan.path)
        .map_err(text)?;
    let mut queue = image
        .queue()
        .and_then(urus::QueueSeat::activate)
        .map_err(text)?;
    let mut buffers: Vec<Buffer> = (0..plan.depth)
        .map(|_| {
            let mut buffer = Buffer::new(plan.block_bytes);
            buffer.as_mut_slice().fill(b'w');
            buffer
        })
        .collect();
    while let Some(seed) = orders.next() {
        orders.answer(slice(plan, &mut queue, &mut buffers, seed));
    }
    drop(queue);
    image.close().map_err(text)
}

fn slice(
    plan: &Plan,
    queue: &mut Queue,
    buffers: &mut Vec<Buffer>,
    seed: u64,
) -> Result<Slice, String> {
    let mut places = plan.places(0, seed);
    let mut operations = 0;
    let mut is_over = false;
    let start = Instant::now();
    loop {
        if !is_over {
            for buffer in buffers.drain(..) {
                let request = if plan.writes {
                    Request::write(0, places.next(), buffer)
                } else {
                    Request::read(0, places.next(), buffer)
                };
                queue.submit(request).map_err(text)?;
            }
        }
        if queue.in_flight() == 0 {
            return Ok(Slice::new(operations, start.elapsed()));
        }
        queue.wait(None);
        while let Some(completion) = queue.completion() {
            completion.result.map_err(text)?;
            buffers.extend(completion.buffer);
            operations += 1;
        }
        is_over = is_over || start.elapsed() >= plan.slice;
    }
}

fn text(error: impl std::fmt::Display) -> String {
    format!("urus: {error}")
}

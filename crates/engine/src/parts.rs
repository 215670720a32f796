//! Parts of the engine one by one, for the benches of this workspace. No part of what is promised.

use std::rc::Rc;

use urus_format::GuestOffset;

use crate::error::Result;
use crate::maintenance::Maintenance;
use crate::map::Lookup;
use crate::shared::Shared;
use crate::storage::Storage;

/// Looks a place of a qcow2 image up in its mapping: the L2 entry as it is on disk, where its slice is cached.
#[must_use]
pub fn look_up(shared: &Shared, offset: u64) -> Option<u64> {
    let image = shared.image.layer.qcow2()?;
    match image
        .map
        .lookup(image.geometry.guest_cluster(GuestOffset(offset)))
    {
        Lookup::Entry(raw) => Some(raw.entry),
        Lookup::NoTable | Lookup::Miss(_) => None,
    }
}

/// Reserves clusters of a writable qcow2 image, as for a queue; how many there were side by side.
///
/// # Errors
/// As a write that needs them.
pub fn reserve<S: Storage>(maintenance: &Maintenance<S>, count: u64) -> Result<u64> {
    let device = Rc::clone(maintenance.device());
    let worker = Rc::clone(&device.worker);
    worker.reactor().block_on(async move {
        let image = device.image();
        let run = image.allocator.reserve(&device.worker, count).await?;
        Ok(run.count)
    })
}

/// Looks the caches of an idle device over: none holds more than its bound, and their accounts are right.
///
/// # Errors
/// What is wrong.
pub fn look_over_caches<S: Storage>(
    maintenance: &Maintenance<S>,
) -> std::result::Result<(), String> {
    let shared = maintenance.shared();
    for layer in shared.chain.layers() {
        let Some(layer) = layer.qcow2() else { continue };
        let (used, most) = layer.meta.lock().frames.looked_over(&layer.map)?;
        if used > most {
            return Err(format!("{used} frames are in use, and {most} may be"));
        }
    }
    let [bytes, counted, most, clusters, ages] = shared.decoded.kept();
    if bytes != counted || clusters != ages || bytes > most && clusters > 1 {
        return Err(format!(
            "{clusters} decoded clusters of {bytes} bytes, with {ages} ages, count {counted}, and {most} may be kept"
        ));
    }
    if maintenance.device().is_raw() {
        return Ok(());
    }
    let (slices, dirty, most) = maintenance.device().image().allocator.refcounts.cached();
    // One that was just read stays for whoever asked for it.
    if slices - dirty > most.max(1) {
        return Err(format!(
            "{slices} slices of refcounts are kept, {dirty} of them dirty, and {most} may be"
        ));
    }
    Ok(())
}

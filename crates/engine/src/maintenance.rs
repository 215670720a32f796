//! The device-owned executor: commit, allocation, settling and control, each a service of its own, on one
//! storage that no queue shares. So the progress of shared work never depends on a queue being polled.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use urus_format::Header;

use crate::alloc::Allocator;
use crate::chain::{LayerSpec, Removed};
use crate::error::{Error, Result};
use crate::open;
use crate::pins::IDLE;
use crate::planted::{self, Bug};
use crate::shared::{Control, ControlReply, Mail, Options, Run, Shared};
use crate::storage::Storage;
use crate::sync::{Arc, Ordering};
use crate::wake::{Sender, Turn, WaitList};
use crate::worker::Worker;

/// What maintenance knows of a qcow2 image beyond its mapping.
pub(crate) struct ImageState {
    pub(crate) header: RefCell<Header>,
    pub(crate) allocator: Allocator,
    /// Clusters in use whose first reference is not counted yet.
    pub(crate) uncounted: RefCell<Vec<(u64, u64)>>,
}

/// The services' common state.
pub(crate) struct Device<S: Storage> {
    pub(crate) worker: Rc<Worker<S>>,
    /// `None` for raw, and for qcow2 opened read-only.
    image: RefCell<Option<Rc<ImageState>>>,
    /// Removals that are durable, and not settled.
    pub(crate) settling: RefCell<VecDeque<Removed>>,
    /// Clusters (first, count) that have lost a reference, and whose refcounts could not be read.
    pub(crate) unsettled: RefCell<Vec<(u64, u64)>>,
    pub(crate) settler: RefCell<Option<Waker>>,
    pub(crate) settled: Cell<bool>,
    pub(crate) settled_waiters: RefCell<WaitList>,
    /// One header write at a time.
    pub(crate) header_turn: Turn,
    /// The file system cannot punch.
    pub(crate) no_punch: Cell<bool>,
    /// All of the L1 table has its room on the disk.
    l1_has_room: Cell<bool>,
    /// The metadata was to be read again, and could not be: nothing of it is to be used.
    half_read: Cell<bool>,
}

/// The maintenance executor of one device. It belongs to the thread that made it.
pub struct Maintenance<S: Storage> {
    device: Rc<Device<S>>,
}

impl<S: Storage> Maintenance<S> {
    /// Opens a device over its chain: reads the metadata that stays in memory, and repairs a dirty image that is
    /// opened for writing. Waits for I/O.
    ///
    /// # Errors
    /// What the headers, tables or the storage make impossible. Nothing was changed then, but for a repair that
    /// had begun.
    pub fn open(storage: S, layers: Vec<LayerSpec>, options: Options) -> Result<Self> {
        let (worker, image) = open::open(storage, layers, options)?;
        let device = Rc::new(Device {
            worker: Rc::clone(&worker),
            image: RefCell::new(image.map(Rc::new)),
            settling: RefCell::default(),
            unsettled: RefCell::default(),
            settler: RefCell::new(None),
            settled: Cell::new(true),
            settled_waiters: RefCell::default(),
            header_turn: Turn::default(),
            no_punch: Cell::new(false),
            l1_has_room: Cell::new(false),
            half_read: Cell::new(false),
        });
        let service = Rc::clone(&device);
        worker
            .reactor()
            .spawn(async move { service.commit_forever().await });
        let service = Rc::clone(&device);
        worker
            .reactor()
            .spawn(async move { service.allocate_forever().await });
        let service = Rc::clone(&device);
        worker
            .reactor()
            .spawn(async move { service.settle_forever().await });
        let service = Rc::clone(&device);
        worker
            .reactor()
            .spawn(async move { service.control_forever().await });
        Ok(Self { device })
    }

    /// What the device's queues share.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(self.device.shared())
    }

    pub(crate) fn device(&self) -> &Rc<Device<S>> {
        &self.device
    }

    /// Goes on with whatever can go on, without waiting; whether anything did.
    pub fn poll(&mut self) -> bool {
        self.device.worker.reactor().turn(|_, _| {})
    }

    /// Announces that the owner is about to sleep; `false` where it has to [`poll`](Self::poll) once more first. From
    /// here on whoever wakes maintenance notifies its thread.
    pub fn prepare_sleep(&mut self) -> bool {
        self.device.worker.reactor().prepare_sleep()
    }

    /// Sleeps until something can go on, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.device.worker.reactor().wait(timeout);
    }

    /// Works until the device is closed.
    pub fn run(&mut self) {
        loop {
            self.poll();
            if self.is_closed() {
                return;
            }
            self.wait(None);
        }
    }

    /// Whether [`Control::Close`] was done.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.device.shared().mail.lock().closed
    }

    /// Works with the storage.
    pub fn with_storage<R>(&mut self, f: impl FnOnce(&mut S) -> R) -> R {
        self.device.worker.reactor().with_storage(f)
    }
}

impl<S: Storage> Drop for Maintenance<S> {
    /// The services hold the device, and the device's reactor holds the services: without this nothing of them, the
    /// storage included, would ever be let go of. Queues that outlive maintenance get [`Error::Closed`].
    fn drop(&mut self) {
        let shared = self.device.shared();
        shared.closed.store(true, Ordering::SeqCst);
        shared.gate.close();
        // In one step with the mark: what is posted later is not kept either.
        let mail = shared.mail.lock().end();
        // Not under the lock: dropped senders wake those who wait.
        drop(mail);
        self.device.worker.reactor().abandon_tasks();
        shared.pins.nudge_queues();
    }
}

enum Allocation {
    Reserve(u64, Sender<Result<Run>>),
    GivenBack(Vec<Run>),
}

impl<S: Storage> Device<S> {
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.worker.shared
    }

    /// The image's state. Only a writable qcow2 image has one.
    pub(crate) fn image(&self) -> Rc<ImageState> {
        Rc::clone(
            self.image
                .borrow()
                .as_ref()
                .expect("asked of writable qcow2 images only"),
        )
    }

    /// Whether there is no metadata to commit.
    pub(crate) fn is_raw(&self) -> bool {
        self.image.borrow().is_none()
    }

    async fn commit_forever(&self) {
        let take = |mail: &mut Mail| {
            let wanted = mail.commit || !mail.flush.is_empty();
            mail.commit = false;
            wanted.then(|| std::mem::take(&mut mail.flush))
        };
        loop {
            // Whoever asks from here on joins the next commit: this one is sealed before anything else runs.
            let waiters = self.shared().mail(take, |mail| &mut mail.committer).await;
            let result = if self.shared().read_only() {
                Ok(())
            } else {
                self.commit().await
            };
            if let Err(error) = &result {
                tracing::warn!(image = self.shared().image_name(), %error, "a commit failed");
            }
            for waiter in waiters {
                waiter(result.clone());
            }
        }
    }

    async fn allocate_forever(&self) {
        let take = |mail: &mut Mail| {
            if !mail.given_back.is_empty() {
                return Some(Allocation::GivenBack(std::mem::take(&mut mail.given_back)));
            }
            mail.reserve
                .pop_front()
                .map(|(count, sender)| Allocation::Reserve(count, sender))
        };
        loop {
            match self.shared().mail(take, |mail| &mut mail.allocator).await {
                Allocation::GivenBack(runs) => {
                    for run in runs {
                        self.image().allocator.give_back(run);
                    }
                }
                Allocation::Reserve(count, sender) => {
                    sender.send(self.reserve(count).await);
                }
            }
        }
    }

    async fn reserve(&self, count: u64) -> Result<Run> {
        if !self.l1_has_room.get() {
            // In a new image it is a hole. One that has moved was written whole.
            let (offset, bytes) =
                self.with_header(|header| (header.l1_table.0, u64::from(header.l1_entries) * 8));
            if bytes > 0 {
                self.worker.take_room(offset, bytes).await?;
            }
            self.l1_has_room.set(true);
        }
        let result = self.image().allocator.reserve(&self.worker, count).await;
        if matches!(&result, Err(error) if error.is_out_of_space()) {
            // What was freed and not committed may be enough for the next one.
            self.shared().request_commit();
        }
        result
    }

    async fn control_forever(&self) {
        loop {
            let control = self
                .shared()
                .mail(|mail| mail.control.pop_front(), |mail| &mut mail.controller)
                .await;
            match control {
                Control::Flush(reply) => reply(self.flush().await),
                Control::Pause(reply) => {
                    let result = self.pause().await;
                    if result.is_err() {
                        self.open_gate();
                    }
                    reply(result);
                }
                Control::Resume(header, reply) => reply(self.resume(header).await),
                Control::Resize(size, reply) => {
                    let paused = self.shared().gate.is_closed();
                    let result = self.resize(size).await;
                    if !paused {
                        self.open_gate();
                    }
                    reply(result);
                }
                Control::Close(reply) => self.close(reply).await,
            }
        }
    }

    pub(crate) async fn flush(&self) -> Result<()> {
        if self.shared().read_only() {
            return Ok(());
        }
        self.shared()
            .request_flush()
            .receive()
            .await
            .unwrap_or(Err(Error::Closed))
    }

    /// Closes the gate and waits for every request in flight, on every queue. Their owners have to go on polling
    /// their queues.
    pub(crate) async fn quiesce(&self) {
        self.shared().gate.close();
        let _: Option<()> = self.shared().wait_for_pins(IDLE).receive().await;
    }

    fn open_gate(&self) {
        self.shared().gate.open(&self.shared().pins);
    }

    /// O12: pausing flushes metadata, all of it, so that another process may take the image.
    async fn pause(&self) -> Result<()> {
        self.quiesce().await;
        self.commit_and_settle().await
    }

    /// Everything durable, nothing left to settle, no decrement left to write.
    async fn commit_and_settle(&self) -> Result<()> {
        if self.shared().read_only() {
            return Ok(());
        }
        self.flush().await?;
        if self.is_raw() {
            return Ok(());
        }
        self.wait_settled().await;
        let settled = self.settle_rest().await;
        if self.image().allocator.refcounts.is_dirty() {
            self.flush().await?;
        }
        let image = self.image();
        image.allocator.give_slack_back(&self.worker).await;
        settled
    }

    async fn resume(&self, header: Option<Box<Header>>) -> Result<()> {
        if planted::is(Bug::EarlyResume) {
            self.open_gate();
        }
        if let Some(header) = header {
            self.half_read.set(true);
            let image = open::reload(&self.worker, *header).await?;
            *self.image.borrow_mut() = image.map(Rc::new);
            // The L1 table may be another one.
            self.l1_has_room.set(false);
            self.half_read.set(false);
        }
        if self.half_read.get() {
            return Err(Error::Unsupported {
                what: format!(
                    "{} cannot go on: its metadata could not be read after the pause; read it again",
                    self.shared().image_name()
                ),
            });
        }
        self.open_gate();
        Ok(())
    }

    async fn close(&self, reply: ControlReply) {
        self.shared().closed.store(true, Ordering::SeqCst);
        self.shared().gate.close();
        self.shared().pins.nudge_queues();
        self.quiesce().await;
        let result = self.commit_and_settle().await;
        self.shared().mail.lock().closed = true;
        reply(result);
    }
}

//! What all queues of a device and its maintenance executor share.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::Poll;

use urus_format::{Geometry, Header};

use crate::chain::{Chain, Layer};
use crate::check::{CheckReport, Repair};
use crate::counters::Stats;
use crate::decoded::DecodedCache;
use crate::error::{Error, Result};
use crate::file::Facts;
use crate::file::hooks::Hooks;
use crate::gate::Gate;
use crate::image::Image;
use crate::limits;
use crate::pins::Pins;
use crate::storage::FileId;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use crate::wake::{Receiver, Sender, WaitList, oneshot};

/// How a device works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Writes fail, and nothing is repaired.
    pub read_only: bool,
    /// Budget of the mapping cache in bytes, over all layers.
    pub l2_cache_bytes: u64,
    /// Slices of refcounts, of at most 4 KiB, that are kept in memory though they are clean.
    pub refcount_cache_slices: usize,
    /// Discarded and otherwise freed clusters are given back to the file system.
    pub discard: bool,
    /// For the simulator.
    #[doc(hidden)]
    pub sizes: limits::Sizes,
    /// What to repair at opening, before the first allocation. (A dirty image is repaired in any case.)
    pub repair: Repair,
    /// Count leaked clusters at opening, where that takes little: see [`Shared::found_at_opening`].
    pub count_leaks: bool,
    /// What is done to data on its way, and who is told of changes.
    pub hooks: Hooks,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            l2_cache_bytes: limits::DEFAULT_L2_CACHE_BYTES,
            refcount_cache_slices: limits::REFCOUNT_CACHE_SLICES,
            discard: true,
            sizes: limits::Sizes::default(),
            repair: Repair::None,
            count_leaks: false,
            hooks: Hooks::default(),
        }
    }
}

/// Host clusters reserved in memory for one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) count: u64,
    /// They read as zeroes, durably so at the latest with the next barrier.
    pub(crate) zero: bool,
}

/// Answers a [`Control`].
pub type ControlReply = Box<dyn FnOnce(Result<()>) + Send>;

/// What the owner of a device asks of its maintenance executor. Each is answered exactly once.
#[non_exhaustive]
pub enum Control {
    /// Commit, as a flush of a queue does.
    Flush(ControlReply),
    /// Hold new requests, wait for those in flight on every queue, commit and settle everything. Further
    /// requests wait in their queues until [`Control::Resume`].
    Pause(ControlReply),
    /// Read the metadata again (another process may have written the image) and let requests go on. The layers
    /// are the header as it is now.
    Resume(Option<Box<Header>>, ControlReply),
    /// Change the size of the virtual disk, in bytes.
    Resize(u64, ControlReply),
    /// Drain, commit, settle and stop. Requests that come later fail.
    Close(ControlReply),
}

/// What queues ask of the maintenance executor.
#[derive(Default)]
pub(crate) struct Mail {
    pub(crate) reserve: VecDeque<(u64, Sender<Result<Run>>)>,
    pub(crate) flush: Vec<ControlReply>,
    /// A commit is wanted although nobody flushes (frames or free clusters run out).
    pub(crate) commit: bool,
    pub(crate) given_back: Vec<Run>,
    /// Waits for every request that began before a mark.
    pub(crate) pins: Vec<(u64, Sender<()>)>,
    pub(crate) control: VecDeque<Control>,
    pub(crate) closed: bool,
    pub(crate) allocator: WaitList,
    pub(crate) committer: WaitList,
    pub(crate) controller: WaitList,
    pub(crate) settler: WaitList,
}

impl Mail {
    /// Nobody takes any more: gives out what is there, for the caller to drop after the lock.
    pub(crate) fn end(&mut self) -> Self {
        std::mem::replace(
            self,
            Self {
                closed: true,
                ..Self::default()
            },
        )
    }
}

/// Shared by all queues and the maintenance executor of one device.
pub struct Shared {
    pub(crate) chain: Arc<Chain>,
    /// The chain's top, as what is written to.
    pub(crate) image: Arc<Image>,
    pub(crate) options: Options,
    pub(crate) pins: Arc<Pins>,
    pub(crate) mail: Mutex<Mail>,
    pub(crate) decoded: DecodedCache,
    pub(crate) gate: Gate,
    pub(crate) closed: AtomicBool,
    /// Requests that go on for long end at their next step.
    pub(crate) cut_short: AtomicBool,
    pub(crate) stats: Stats,
    /// What a check at opening has found.
    pub(crate) found: Mutex<Option<CheckReport>>,
}

impl Shared {
    /// What was found and repaired at opening ([`Options::repair`], [`Options::count_leaks`]). None where the metadata was not
    /// checked: not asked for, opened read-only, or too much to be read at an opening.
    #[must_use]
    pub fn found_at_opening(&self) -> Option<CheckReport> {
        self.found.lock().clone()
    }

    /// Bytes of the virtual disk.
    #[must_use]
    #[inline]
    pub fn size(&self) -> u64 {
        self.image.layer.size()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// Whether an earlier sync failed, so that writes are refused.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.image.poisoned.load(Ordering::SeqCst)
    }

    /// Sizes of the image; `None` for raw.
    #[must_use]
    pub fn geometry(&self) -> Option<Geometry> {
        self.image.layer.qcow2().map(|layer| layer.geometry)
    }

    /// Files in the chain: 1 without a backing file.
    #[must_use]
    pub fn chain_depth(&self) -> usize {
        self.chain.depth()
    }

    /// Asks something of the maintenance executor.
    pub fn control(&self, control: Control) {
        match control {
            // Not behind a pause under way, which may wait for a request of the caller's own.
            Control::Flush(reply) => self.post_flush(reply),
            control => self.post(|mail| {
                mail.control.push_back(control);
                mail.controller.take()
            }),
        }
    }

    /// From now on a discard or write-zeroes under way ends at its next step, with [`Error::Closed`]: its range may be
    /// cleared in part. For an owner that is about to close the device and does not want to wait for
    /// requests that cover terabytes.
    pub fn cut_clearing_short(&self) {
        self.cut_short.store(true, Ordering::Relaxed);
    }

    pub(crate) fn check_not_cut_short(&self) -> Result<()> {
        if self.cut_short.load(Ordering::Relaxed) {
            return Err(Error::Closed);
        }
        Ok(())
    }

    fn post_flush(&self, reply: ControlReply) {
        self.post(|mail| {
            mail.flush.push(reply);
            mail.committer.take()
        });
    }

    /// The files of the device, by number, as each thread's transfers need to know them.
    pub(crate) fn file_facts(&self) -> Vec<Facts> {
        let facts = |layer: &Layer| Facts {
            name: layer.name.clone(),
            transform: self
                .options
                .hooks
                .transform
                .clone()
                .filter(|_| layer.id == self.image.layer.id),
        };
        let mut layers: Vec<&Layer> = self.chain.layers().collect();
        layers.sort_unstable_by_key(|layer| layer.file);
        debug_assert!(
            (0..)
                .zip(&layers)
                .all(|(at, layer)| layer.file == FileId(at))
        );
        layers.into_iter().map(facts).collect()
    }

    /// A guest's change is about to begin.
    #[inline]
    pub(crate) fn observe(&self, offset: u64, len: u64) {
        if let Some(observer) = &self.options.hooks.observer {
            observer.changes(offset, len);
        }
    }

    pub(crate) fn image_name(&self) -> &str {
        &self.image.layer.name
    }

    fn post(&self, put: impl FnOnce(&mut Mail) -> VecDeque<std::task::Waker>) {
        let (wakers, undeliverable) = {
            let mut mail = self.mail.lock();
            let wakers = put(&mut mail);
            (wakers, mail.closed.then(|| mail.end()))
        };
        // Not under the lock: whoever waits for an answer learns that there is none.
        drop(undeliverable);
        for waker in wakers {
            waker.wake();
        }
    }

    /// Asks for `count` clusters, or some at least.
    pub(crate) fn reserve(&self, count: u64) -> Receiver<Result<Run>> {
        let (sender, receiver) = oneshot();
        self.post(|mail| {
            mail.reserve.push_back((count, sender));
            mail.allocator.take()
        });
        receiver
    }

    /// Gives clusters back that were reserved and never referenced.
    pub(crate) fn give_back(&self, run: Run) {
        self.post(|mail| {
            mail.given_back.push(run);
            mail.allocator.take()
        });
    }

    /// Everything whose completion was seen before is durable when it answers.
    pub(crate) fn request_flush(&self) -> Receiver<Result<()>> {
        let (sender, receiver) = oneshot();
        self.post_flush(Box::new(move |result| sender.send(result)));
        receiver
    }

    /// Answers once every request in flight began after `mark`.
    pub(crate) fn wait_for_pins(&self, mark: u64) -> Receiver<()> {
        let (sender, receiver) = oneshot();
        self.post(|mail| {
            mail.pins.push((mark, sender));
            mail.settler.take()
        });
        receiver
    }

    /// Starts a commit without waiting for it.
    pub(crate) fn request_commit(&self) {
        self.post(|mail| {
            mail.commit = true;
            mail.committer.take()
        });
    }

    /// Waits for mail: `take` looks for it, `list` is where its wakers wait.
    pub(crate) async fn mail<T>(
        &self,
        mut take: impl FnMut(&mut Mail) -> Option<T>,
        list: impl Fn(&mut Mail) -> &mut WaitList,
    ) -> T {
        poll_fn(|cx| {
            let mut mail = self.mail.lock();
            if let Some(found) = take(&mut mail) {
                return Poll::Ready(found);
            }
            list(&mut mail).register(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// A write may go on.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        if self.is_poisoned() {
            return Err(Error::Poisoned {
                file: self.image_name().to_owned(),
            });
        }
        Ok(())
    }
}

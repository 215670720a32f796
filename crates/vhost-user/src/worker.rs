//! The thread of a virtqueue: one engine queue, one ring of the kernel's, and a sleep over three eventfds.
//!
//! It is there as long as the server, whatever front ends come and go; [`Message`]s from the control thread give it
//! a virtqueue to work on and take it away again.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use tracing::{error, warn};
use urus::{MemoryRegion, Queue};

use crate::limits;
use crate::memory::Map;
use crate::stats::QueueStats;
use crate::vring::{Logging, Shared, Start, Vring};

/// What the control thread asks of a queue's thread.
pub(crate) enum Message {
    /// Work on this virtqueue. There is none.
    Start(Box<Start>),
    /// Take no more requests, finish those in flight, and say where a successor goes on.
    Stop,
    /// The guest's memory is this from now on.
    Map(Arc<Map>),
    Call(Option<File>),
    Error(Option<File>),
    Logging(Logging),
    /// As [`Stop`](Self::Stop), and end.
    Quit,
}

/// The answer to a message: of [`Message::Stop`] the index of the next available request, if there was a virtqueue.
type Answer = mpsc::SyncSender<Option<u16>>;

/// The thread of a queue is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread of a queue has failed")]
pub(crate) struct Gone;

/// Where the control thread leaves messages.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// None once the thread is gone.
    messages: Mutex<Option<VecDeque<(Message, Answer)>>>,
    /// Messages may be there: looked at often, by a thread that is too busy to sleep.
    rung: AtomicBool,
    bell: OwnedFd,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Start(_) => "Start",
            Self::Stop => "Stop",
            Self::Map(_) => "Map",
            Self::Call(_) => "Call",
            Self::Error(_) => "Error",
            Self::Logging(_) => "Logging",
            Self::Quit => "Quit",
        })
    }
}

impl Inbox {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            messages: Mutex::new(Some(VecDeque::new())),
            rung: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Sends a message and waits until it was done.
    pub(crate) fn ask(&self, message: Message) -> Result<Option<u16>, Gone> {
        let (answer, result) = mpsc::sync_channel(1);
        self.lock()
            .as_mut()
            .ok_or(Gone)?
            .push_back((message, answer));
        self.rung.store(true, Ordering::Release);
        // A full counter rings as well.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        result.recv().map_err(|_| Gone)
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<(Message, Answer)>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_rung(&self) -> bool {
        self.rung.load(Ordering::Acquire)
    }

    fn take(&self) -> Option<(Message, Answer)> {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.rung.store(false, Ordering::Release);
        let mut messages = self.lock();
        let messages = messages.as_mut()?;
        let message = messages.pop_front();
        if !messages.is_empty() {
            self.rung.store(true, Ordering::Release);
        }
        message
    }

    /// Whoever waits for an answer, or asks from now on, is told that there will be none.
    pub(crate) fn close(&self) {
        *self.lock() = None;
    }
}

/// How long to look for work before sleeping.
///
/// The queue polls for as long as its last pauses have been, up to the limit: it does not burn time where requests come
/// too seldom for that to help.
#[derive(Debug)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
}

impl Polling {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
        }
    }

    /// There was nothing to do for this long.
    fn paused(&mut self, pause: Duration) {
        self.window = if pause <= self.limit {
            self.window.max(2 * pause).min(self.limit)
        } else {
            self.window / 2
        };
    }
}

const BELL: u64 = 0;
const QUEUE: u64 = 1;
const KICK: u64 = 2;

/// A queue's thread.
pub(crate) struct Worker {
    index: u16,
    queue: Queue,
    epoll: OwnedFd,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
    stats: Arc<QueueStats>,
    vring: Option<Vring>,
    /// Who waits for the virtqueue to run dry.
    stopping: Option<Answer>,
    quitting: bool,
    polling: Polling,
    /// Register the guest's memory with the ring.
    pin: bool,
    /// The driver has kicked and no request was to be seen: when that is to be told.
    unheard: Option<Instant>,
}

impl Worker {
    /// On the thread that is to run it.
    pub(crate) fn new(
        index: u16,
        mut queue: Queue,
        inbox: Arc<Inbox>,
        shared: Arc<Shared>,
        stats: Arc<QueueStats>,
        polling: Polling,
        pin: bool,
    ) -> Result<Self, crate::Error> {
        let failed = |error| crate::Error::system("watch for events", error);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let watch = |fd, data| {
            let data = epoll::EventData::new_u64(data);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN).map_err(failed)
        };
        watch(inbox.bell.as_fd(), BELL)?;
        watch(queue.event_fd()?, QUEUE)?;
        Ok(Self {
            index,
            queue,
            epoll,
            inbox,
            shared,
            stats,
            vring: None,
            stopping: None,
            quitting: false,
            polling,
            pin,
            unheard: None,
        })
    }

    /// Works until it is told to quit.
    pub(crate) fn run(mut self) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(4);
        loop {
            while self.inbox.is_rung()
                && let Some((message, answer)) = self.inbox.take()
            {
                self.message(message, answer);
            }
            self.work();
            self.stop_if_dry();
            if self.quitting && self.vring.is_none() {
                return Ok(());
            }
            if !self.poll() {
                self.sleep(&mut events)?;
            }
        }
    }

    fn message(&mut self, message: Message, answer: Answer) {
        match message {
            Message::Start(start) => {
                debug_assert!(self.vring.is_none(), "a queue has one virtqueue at a time");
                self.pin(Some(&start.map));
                let vring = Vring::new(
                    self.index,
                    Arc::clone(&self.shared),
                    Arc::clone(&self.stats),
                    *start,
                );
                // Each write to the eventfd is an event of its own, so that it need not be read. What was written
                // before is one too: a kick that came early is not lost.
                let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                let data = epoll::EventData::new_u64(KICK);
                self.unheard = None;
                match epoll::add(&self.epoll, vring.kick(), data, flags) {
                    Ok(()) => self.vring = Some(vring),
                    Err(error) => {
                        warn!(queue = self.index, %error, "cannot wait for kicks on what the front end has sent");
                    }
                }
            }
            Message::Stop | Message::Quit => {
                self.quitting |= matches!(message, Message::Quit);
                // Answered once nothing is in flight.
                self.stopping = Some(answer);
                return;
            }
            Message::Map(map) => {
                self.pin(Some(&map));
                self.with(|vring| vring.set_map(map));
            }
            Message::Call(call) => self.with(|vring| vring.set_call(call)),
            Message::Error(event) => self.with(|vring| vring.set_error(event)),
            Message::Logging(logging) => self.with(|vring| vring.set_logging(logging)),
        }
        let _ = answer.send(None);
    }

    /// Registers the memory of a map with the ring, if that is wanted, and lets go of what was registered.
    fn pin(&mut self, map: Option<&Map>) {
        if !self.pin {
            return;
        }
        let regions = map.map_or_else(Vec::new, |map| MemoryRegion::of_guest(map.memory()));
        if let Err(error) = self.queue.register_memory(regions) {
            warn!(queue = self.index, %error, "the guest's memory is not pinned; its requests are served without");
        }
    }

    fn with(&mut self, action: impl FnOnce(&mut Vring)) {
        if let Some(vring) = &mut self.vring {
            action(vring);
        }
    }

    /// Goes on until there is nothing to do, or a message is there.
    fn work(&mut self) {
        let stopping = self.stopping.is_some();
        match &mut self.vring {
            Some(vring) => {
                while vring.turn(&mut self.queue, stopping).progress && !self.inbox.is_rung() {}
            }
            None => {
                // Nobody waits for an answer; but the engine may have something to do.
                while self.queue.completion().is_some() {}
            }
        }
    }

    fn stop_if_dry(&mut self) {
        if self.stopping.is_none() || self.vring.as_ref().is_some_and(|ring| ring.in_flight() > 0) {
            return;
        }
        let vring = self.vring.take();
        if let Some(vring) = &vring {
            // The front end has the eventfd too: closing ours would not end the watch. It is watched, so it can be
            // removed.
            let _ = epoll::delete(&self.epoll, vring.kick());
            // Nothing of a front end that may be gone is held.
            self.pin(None);
        }
        if let Some(answer) = self.stopping.take() {
            let _ = answer.send(vring.map(|vring| vring.next_avail()));
        }
    }

    /// Looks for work for a while. True when there was some.
    fn poll(&mut self) -> bool {
        if self.polling.window.is_zero() || self.stopping.is_some() {
            return false;
        }
        let Some(vring) = &mut self.vring else {
            return false;
        };
        let begin = Instant::now();
        loop {
            if self.inbox.is_rung() || vring.turn(&mut self.queue, false).progress {
                self.polling.paused(begin.elapsed());
                return true;
            }
            if begin.elapsed() >= self.polling.window {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// The driver has kicked. A request that it has put into memory that this process does not share is never seen here.
    fn kicked(&mut self) {
        if self.vring.as_ref().is_some_and(Vring::is_unheard_of) {
            self.unheard
                .get_or_insert_with(|| Instant::now() + limits::UNHEARD_TIME);
        }
    }

    fn tell_of_unshared_memory(&mut self) {
        if self.unheard.is_none_or(|until| Instant::now() < until) {
            return;
        }
        self.unheard = None;
        if self.vring.as_ref().is_some_and(Vring::is_unheard_of) {
            warn!(
                queue = self.index,
                "the driver has notified its virtqueue, and no request is in it: the guest's memory is \
                 probably not shared with this process; give QEMU a shared memory back end, as \
                 -object memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem"
            );
        }
    }

    fn sleep(&mut self, events: &mut Vec<epoll::Event>) -> Result<(), Errno> {
        let mut now = self.inbox.is_rung();
        if self.stopping.is_none()
            && let Some(vring) = &mut self.vring
        {
            now |= vring.want_kicks(&self.queue);
        }
        let begin = Instant::now();
        let timeout = if now {
            Some(Duration::ZERO)
        } else {
            self.unheard
                .map(|until| until.saturating_duration_since(begin))
        };
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        match epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                error!(queue = self.index, %error, "cannot wait for events");
                return Err(error);
            }
        }
        if !self.polling.limit.is_zero() && self.vring.is_some() {
            self.polling.paused(begin.elapsed());
        }
        for event in events.drain(..) {
            match event.data.u64() {
                QUEUE => self.queue.consume_event(),
                KICK => self.kicked(),
                _ => {}
            }
        }
        self.tell_of_unshared_memory();
        if let Some(vring) = &self.vring {
            vring.refuse_kicks();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Guards the mail of a queue's thread, and the adaptive polling: it grows where requests follow one another, and ends where they do not.
    use super::*;

    /// Guards the control thread against waiting for ever for a thread that has failed.
    #[test]
    fn nobody_waits_for_a_thread_that_is_gone() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let theirs = Arc::clone(&inbox);
        let waiting = std::thread::spawn(move || theirs.ask(Message::Stop));
        while !inbox.is_rung() {
            std::thread::yield_now();
        }
        inbox.close();
        assert_eq!(waiting.join().unwrap(), Err(Gone));
        assert_eq!(inbox.ask(Message::Stop), Err(Gone));
    }

    #[test]
    fn polling_follows_the_pauses() {
        let us = Duration::from_micros;
        let mut polling = Polling::new(us(100));
        assert_eq!(polling.window, Duration::ZERO);
        polling.paused(us(20));
        assert_eq!(polling.window, us(40));
        polling.paused(us(90));
        assert_eq!(polling.window, us(100));
        for _ in 0..40 {
            polling.paused(us(101));
        }
        assert_eq!(polling.window, Duration::ZERO);
        let mut off = Polling::new(Duration::ZERO);
        off.paused(us(5));
        assert_eq!(off.window, Duration::ZERO);
    }
}

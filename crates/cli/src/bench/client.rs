//! What a slice's requests go to: a queue of a device, or a raw file by one of the methods that need neither engine nor driver.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::fs::OFlags;
use urus::{Buffer, Device, Queue, QueueSeat, Request};
use urus_ring::{RawDirection, RawFile, RawMethod};

use super::slices::Plan;
use crate::failure::Failure;

/// A raw file to be read and written by one method.
#[derive(Clone, Debug)]
pub(super) struct RawTarget {
    pub(super) path: PathBuf,
    pub(super) method: RawMethod,
    /// Past the page cache.
    pub(super) direct: bool,
}

/// What is measured, or what it is measured against.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Device(&'a Device),
    /// A device for each queue.
    Devices(&'a [Device]),
    Raw(&'a RawTarget),
}

impl Target<'_> {
    /// A seat for the thread of that number.
    pub(super) fn seat(self, number: u16, writes: bool) -> Result<Seat, Failure> {
        Ok(match self {
            Self::Device(device) => Seat::Device(device.queue()?),
            Self::Devices(devices) => Seat::Device(devices[usize::from(number)].queue()?),
            Self::Raw(raw) => Seat::Raw(raw.open(writes)?, raw.method),
        })
    }

    /// The files behind it that have names.
    pub(super) fn files(self) -> Vec<File> {
        let of_device = |device: &Device| -> Vec<File> {
            let layers = device.layers().iter();
            layers
                .filter_map(|layer| File::open(&layer.path).ok())
                .collect()
        };
        match self {
            Self::Device(device) => of_device(device),
            Self::Devices(devices) => devices.iter().flat_map(of_device).collect(),
            Self::Raw(raw) => File::open(&raw.path).into_iter().collect(),
        }
    }
}

impl RawTarget {
    pub(super) fn open(&self, writes: bool) -> Result<File, Failure> {
        let flags = if self.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        File::options()
            .read(true)
            .write(writes)
            .custom_flags(i32::try_from(flags.bits()).expect("flags of open(2)"))
            .open(&self.path)
            .map_err(|error| Failure::new(format!("cannot open {}: {error}", self.path.display())))
    }
}

/// On its way to the thread that will use it.
pub(super) enum Seat {
    Device(QueueSeat),
    Raw(File, RawMethod),
}

impl Seat {
    pub(super) fn activate(self, plan: Plan) -> Result<Client, Failure> {
        Ok(match self {
            Self::Device(seat) => Client::Device(DeviceClient::new(seat.activate()?, plan)?),
            Self::Raw(file, method) => {
                let open = RawFile::open(file, method, plan.depth, plan.block_len());
                let raw = open.map_err(|error| {
                    Failure::new(format!("cannot use {}: {error}", method.name()))
                })?;
                Client::Raw(Box::new(raw))
            }
        })
    }
}

/// In use by its thread.
pub(super) enum Client {
    Device(DeviceClient),
    Raw(Box<RawFile>),
}

/// What the loop of a slice needs. Slots are numbered from 0, below the plan's depth.
pub(super) trait Load {
    /// Takes the request of a free slot.
    fn submit(&mut self, slot: usize, offset: u64, writes: bool);

    /// Makes durable what has been written; waits for it. Nothing may be in flight.
    fn flush(&mut self) -> Result<(), Failure>;

    /// Starts what was submitted, and sleeps until something has ended.
    fn wait(&mut self) -> Result<(), Failure>;

    /// The slot of a request that has ended.
    fn completion(&mut self) -> Option<(usize, Result<(), Failure>)>;

    fn in_flight(&self) -> usize;
}

/// A queue with a buffer for each request in flight.
pub(super) struct DeviceClient {
    queue: Queue,
    /// By slot; none while it is in flight.
    buffers: Vec<Option<Buffer>>,
}

impl DeviceClient {
    fn new(mut queue: Queue, plan: Plan) -> Result<Self, Failure> {
        let depth = usize::try_from(plan.depth).expect("32 bits fit a usize");
        let (buffers, region) = Buffer::pool(depth, plan.block_len());
        if plan.registered {
            queue.register_memory(vec![region])?;
        }
        let buffers = buffers
            .into_iter()
            .map(|mut buffer| {
                // Not zeroes: those could be written without being stored.
                buffer.as_mut_slice().fill(b'w');
                Some(buffer)
            })
            .collect();
        Ok(Self { queue, buffers })
    }
}

impl Load for DeviceClient {
    #[inline]
    fn submit(&mut self, slot: usize, offset: u64, writes: bool) {
        let buffer = self.buffers[slot].take().expect("a free slot");
        let token = u64::try_from(slot).expect("fits");
        let request = if writes {
            Request::write(token, offset, buffer)
        } else {
            Request::read(token, offset, buffer)
        };
        self.queue
            .submit(request)
            .expect("the queue is as deep as there are slots");
    }

    fn flush(&mut self) -> Result<(), Failure> {
        let flush = Request::flush(0);
        self.queue.submit(flush).expect("nothing is in flight");
        loop {
            self.queue.wait(None);
            if let Some(completion) = self.queue.completion() {
                return Ok(completion.result?);
            }
        }
    }

    #[inline]
    fn wait(&mut self) -> Result<(), Failure> {
        self.queue.wait(None);
        Ok(())
    }

    #[inline]
    fn completion(&mut self) -> Option<(usize, Result<(), Failure>)> {
        let completion = self.queue.completion()?;
        let slot = usize::try_from(completion.token).expect("less than the depth");
        self.buffers[slot] = completion.buffer;
        Some((slot, completion.result.map_err(Failure::from)))
    }

    #[inline]
    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }
}

impl Load for RawFile {
    #[inline]
    fn submit(&mut self, slot: usize, offset: u64, writes: bool) {
        let direction = if writes {
            RawDirection::Write
        } else {
            RawDirection::Read
        };
        RawFile::submit(self, slot, offset, direction);
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.sync_data()
            .map_err(|error| Failure::new(format!("cannot sync the raw file: {error}")))
    }

    #[inline]
    fn wait(&mut self) -> Result<(), Failure> {
        RawFile::wait(self).map_err(|error| Failure::new(format!("io_uring_enter: {error}")))
    }

    #[inline]
    fn completion(&mut self) -> Option<(usize, Result<(), Failure>)> {
        let (slot, result) = RawFile::completion(self)?;
        let result =
            result.map_err(|error| Failure::new(format!("a request of the raw file: {error}")));
        Some((slot, result))
    }

    #[inline]
    fn in_flight(&self) -> usize {
        RawFile::in_flight(self)
    }
}

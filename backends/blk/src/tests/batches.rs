//! What lies between a medium that completes many requests at once and the next ones for it.
#![expect(unsafe_code, reason = "an engine's `start` is unsafe")]

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use berth_queue_worker::QueueStart;

use super::*;
use crate::engine::{DiskEngine, Io};
use crate::worker::BlkWorker;

const DEPTH: usize = 32;
const DEADLINE: Duration = Duration::from_secs(20);

/// A medium that completes all at once, when it has [`DEPTH`] requests.
struct Convoy {
    waiting: Vec<u64>,
    under_way: Vec<u64>,
    completed: Vec<u64>,
    /// Readable at its end when all has completed.
    ready: [UnixStream; 2],
    /// Nothing more is taken after the first completions before the driver has seen answers.
    driver_has_some: Option<Receiver<()>>,
    some_taken: bool,
}

impl DiskEngine for Convoy {
    unsafe fn start(&mut self, tag: u64, _: &Io) -> bool {
        let (waiting, under_way) = (self.waiting.len(), self.under_way.len());
        assert!(
            waiting <= under_way,
            "{waiting} wait for one more, and the medium has only {under_way}"
        );
        self.waiting.push(tag);
        true
    }

    fn submit(&mut self) -> io::Result<()> {
        self.under_way.append(&mut self.waiting);
        if self.under_way.len() == DEPTH {
            self.completed.append(&mut self.under_way);
            self.ready[0].write_all(&[1])?;
        }
        Ok(())
    }

    fn is_starved(&mut self) -> bool {
        self.waiting.len() > self.under_way.len()
    }

    fn take_completions(&mut self, limit: usize, each: &mut dyn FnMut(u64, i32)) -> io::Result<()> {
        if self.some_taken
            && let Some(seen) = self.driver_has_some.take()
        {
            let seen = seen.recv_timeout(DEADLINE);
            seen.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        }
        let count = limit.min(self.completed.len());
        for tag in self.completed.drain(..count) {
            self.some_taken = true;
            each(tag, 4096);
        }
        Ok(())
    }

    fn done_here(&self) -> usize {
        0
    }

    fn is_ready(&mut self) -> bool {
        !self.completed.is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.ready[1].as_raw_fd())
    }

    fn clear_event(&self) {
        let _ = (&self.ready[1]).read(&mut [0; 8]);
    }
}

/// A disk on it.
struct ConvoyDevice {
    disk: BlkDevice,
    engine: Mutex<Option<Convoy>>,
}

impl Device for ConvoyDevice {
    const NAME: &'static str = "blk";
    type Worker = BlkWorker;

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn num_queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        self.disk.config()
    }

    fn new_worker(&self, start: &QueueStart) -> io::Result<BlkWorker> {
        let engine = self.engine.lock().unwrap().take();
        let engine = engine.expect("the ring starts once");
        let shared = Arc::clone(self.disk.shared());
        BlkWorker::with_engine(shared, start, |_, _| Box::new(engine))
    }
}

#[test]
fn medium_has_the_first_request_and_the_driver_the_first_answer_before_the_batch_is_through() {
    let image = TempImage::new(MIB);
    let (driver_has_some, told) = channel();
    let ready = UnixStream::pair().unwrap();
    let engine = Convoy {
        waiting: Vec::new(),
        under_way: Vec::new(),
        completed: Vec::new(),
        ready: ready.into(),
        driver_has_some: Some(told),
        some_taken: false,
    };
    let device = ConvoyDevice {
        disk: BlkDevice::new(
            Disk::open(&image.options()).unwrap(),
            &config(EngineChoice::Sync),
        ),
        engine: Mutex::new(Some(engine)),
    };
    let metrics = Metrics::new(ConvoyDevice::NAME, 1);
    let mut driver = FakeDriver::start(Arc::new(device), &metrics, Setup::default());
    let ram = Arc::clone(&driver.ram);
    let status = ram.alloc(1, 1);
    let queue = &mut driver.queues[0];
    for _ in 0..DEPTH {
        let data = Buffer::writable(ram.alloc(4096, 4096), 4096);
        let buffers = [
            header(&ram, VIRTIO_BLK_T_IN, 0),
            data,
            Buffer::writable(status, 1),
        ];
        queue.add(&buffers).unwrap();
    }
    queue.kick();
    queue.wait_used();
    driver_has_some.send(()).unwrap();
    for _ in 1..DEPTH {
        assert_eq!(queue.wait_used().1, 4097);
    }
}

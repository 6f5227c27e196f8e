//! Output on its way from the guest to the host: a bounded queue and the thread that empties it.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sink::{Sink, Written};
use crate::sandbox::{self, ThreadKind};

/// Bytes that wait for a slow reader, at most.
pub const CAPACITY: usize = 256 << 10;
/// How long a vCPU waits for room before bytes are dropped.
pub const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// The thread has taken bytes that it has not written yet.
    writing: bool,
    /// A wait for room was in vain and the reader has not moved since.
    stuck: bool,
    dropped: u64,
    sink: Sink,
    /// The host's end is gone: the thread is to end.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    /// Held for moving bytes, never while the host is written to.
    queue: Mutex<Queue>,
    /// The queue got bytes, or a sink.
    filled: Condvar,
    /// The queue got room, or is empty and written.
    emptied: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's end of the queue; its clones are the same queue.
#[derive(Clone, Default)]
pub struct Output {
    shared: Arc<Shared>,
}

impl Output {
    /// A queue that drops everything: no thread, no reader.
    pub fn unread() -> Self {
        Self::default()
    }

    /// A queue with a thread that writes to `sink`.
    pub fn new(sink: Sink) -> io::Result<Self> {
        let output = Self::default();
        output.set_sink(sink);
        let shared = Arc::clone(&output.shared);
        sandbox::spawn(ThreadKind::SerialOut, "serial-out", move || run(&shared))?;
        Ok(output)
    }

    /// Changes where bytes go. Those still in the queue go to the new place.
    pub fn set_sink(&self, sink: Sink) {
        let mut queue = self.shared.lock();
        if sink.is_nobody() {
            queue.bytes.clear();
        }
        queue.sink = sink;
        queue.stuck = false;
        self.shared.filled.notify_one();
        self.shared.emptied.notify_all();
    }

    /// There will be no reader any more: lets go of the last one and of the thread. What the guest writes
    /// from here on is dropped.
    pub fn end(&self) {
        self.shared.lock().ended = true;
        self.set_sink(Sink::Nobody);
    }

    /// Bytes that were dropped because nobody took them.
    pub fn dropped(&self) -> u64 {
        self.shared.lock().dropped
    }

    /// Waits until everything is written, at most `patience`.
    pub fn flush_for(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut queue = self.shared.lock();
        while !queue.sink.is_nobody() && (queue.writing || !queue.bytes.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            queue = wait(&self.shared.emptied, queue, left);
        }
    }

    /// Waits until the queue has room, at most [`PATIENCE`], and not at all while the reader is stuck.
    /// To be called before [`Write::write`], without a lock.
    pub fn wait_for_room(&self) {
        let mut queue = self.shared.lock();
        if queue.bytes.len() < CAPACITY || queue.stuck {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while queue.bytes.len() >= CAPACITY {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queue.stuck = true;
                return;
            }
            queue = wait(&self.shared.emptied, queue, left);
        }
    }

    /// Never waits: what does not fit is dropped.
    fn push(&self, bytes: &[u8]) {
        let mut queue = self.shared.lock();
        let room = if queue.sink.is_nobody() {
            0
        } else {
            CAPACITY.saturating_sub(queue.bytes.len()).min(bytes.len())
        };
        queue.dropped += (bytes.len() - room) as u64;
        if room > 0 {
            queue.bytes.extend(&bytes[..room]);
            self.shared.filled.notify_one();
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn wait<'a>(
    condvar: &Condvar,
    guard: MutexGuard<'a, Queue>,
    left: Duration,
) -> MutexGuard<'a, Queue> {
    let waited = condvar.wait_timeout(guard, left);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Ends with [`Output::end`], which does not wait for it: the host may hold a write for as long as it likes.
fn run(shared: &Shared) {
    let mut chunk = Vec::new();
    loop {
        let mut queue = shared.lock();
        while queue.bytes.is_empty() {
            if queue.ended {
                return;
            }
            queue = shared
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let take = queue.bytes.len().min(4096);
        chunk.clear();
        chunk.extend(queue.bytes.drain(..take));
        queue.writing = true;
        let sink = queue.sink.clone();
        drop(queue);

        let written = sink.write(&chunk);

        let mut queue = shared.lock();
        queue.writing = false;
        match written {
            Written::All => queue.stuck = false,
            Written::Part(count) => {
                queue.dropped += (chunk.len() - count) as u64;
                queue.stuck = count == 0;
            }
            Written::Failed(error) => {
                tracing::warn!(%error, "serial output is dropped from here on");
                queue.dropped += chunk.len() as u64;
                queue.bytes.clear();
                // Unless someone has put a new sink in its place meanwhile.
                if queue.sink.is_same(&sink) {
                    queue.sink = Sink::Nobody;
                }
            }
        }
        shared.emptied.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_arrive_in_order() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut output = Output::new(Sink::socket(ours).unwrap()).unwrap();
        let sent: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        let reader = std::thread::spawn(move || {
            let mut received = vec![0; 100_000];
            theirs.read_exact(&mut received).unwrap();
            received
        });
        for byte in &sent {
            output.wait_for_room();
            output.write_all(&[*byte]).unwrap();
        }
        assert_eq!(reader.join().unwrap(), sent);
        output.flush_for(Duration::from_secs(5));
        assert_eq!(output.dropped(), 0);
    }

    #[test]
    fn an_end_lets_go_of_the_reader_also_while_the_guest_has_the_other_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut guests_end = {
            let output = Output::new(Sink::socket(ours).unwrap()).unwrap();
            output.push(b"last words");
            output.flush_for(Duration::from_secs(60));
            output.end();
            output.clone()
        };
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        guests_end.write_all(b"more").unwrap();
        assert_eq!(guests_end.dropped(), 4);
    }

    #[test]
    fn nobody_reading_costs_no_time() {
        let output = Output::unread();
        let start = Instant::now();
        for _ in 0..1000 {
            output.wait_for_room();
            output.push(b"x");
        }
        assert_eq!(output.dropped(), 1000);
        assert!(start.elapsed() < PATIENCE);
    }

    #[test]
    fn a_reader_that_stopped_costs_one_wait() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let output = Output::new(Sink::socket(ours).unwrap()).unwrap();
        let start = Instant::now();
        for _ in 0..(4 * CAPACITY / 4096) {
            output.wait_for_room();
            output.push(&[0; 4096]);
        }
        assert!(output.dropped() > 0);
        assert!(start.elapsed() < 20 * PATIENCE, "{:?}", start.elapsed());
    }
}

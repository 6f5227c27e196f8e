//! Counters of every queue, and the socket that shows them.
//!
//! Each counter has one writer, the queue's worker thread, which does a relaxed load and store (no
//! locked instruction); readers see a value that is at most a moment old. One queue's counters
//! fill cache lines of their own. They count from the start of the process, across frontends.
//!
//! [`MetricsServer`] runs on a thread of its own, `metrics`, and answers every connection on
//! `--metrics-socket=PATH` with the Prometheus text format: as an HTTP/1.0 response where the peer
//! sent a request line, plain where it sent nothing.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::{error, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::endpoint::Listener;
use crate::latency::Histogram;
use crate::sandbox::{self, ThreadKind};
use crate::sys;

/// A number with one writer and many readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. To be called by the counter's one writer only.
    pub fn add(&self, n: u64) {
        let value = self.0.load(Ordering::Relaxed).wrapping_add(n);
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted for each queue.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueCounters {
    /// Doorbells: the sum of all values read from the kick eventfd.
    pub kicks: Counter,
    /// Writes to the call eventfd.
    pub calls: Counter,
    /// Batches: calls of `process` that published at least one used entry.
    pub batches: Counter,
    /// Waits that ended while polling, so without a sleep.
    pub polls: Counter,
    /// Waits in which the thread slept.
    pub sleeps: Counter,
    /// Requests (or packets) completed. Counted by the device.
    pub requests: Counter,
    /// Requests completed with an error. Counted by the device.
    pub errors: Counter,
    /// Packets dropped. Counted by the device.
    pub dropped: Counter,
    /// Requests (or packets) that had to wait for a rate limit. Counted by the device.
    pub throttled: Counter,
    /// Payload bytes that went to the guest. Counted by the device.
    pub bytes_to_guest: Counter,
    /// Payload bytes that came from the guest. Counted by the device.
    pub bytes_from_guest: Counter,
    /// From the pop of each request's chain to its used entry.
    pub latency: Histogram,
}

/// The counters of all queues of a device.
#[derive(Clone, Debug)]
pub struct Metrics {
    device: &'static str,
    queues: Arc<[Arc<QueueCounters>]>,
    more: Option<More>,
}

/// Further text, asked for each time.
#[derive(Clone)]
struct More(Arc<dyn Fn() -> String + Send + Sync>);

impl std::fmt::Debug for More {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("More")
    }
}

impl Metrics {
    /// Counters for `num_queues` queues of the device called `device`.
    pub fn new(device: &'static str, num_queues: u16) -> Metrics {
        let queues = (0..num_queues).map(|_| Arc::default()).collect();
        Metrics {
            device,
            queues,
            more: None,
        }
    }

    /// The same with whatever `more` says behind it, called on the thread that asks.
    #[must_use]
    pub fn with(mut self, more: impl Fn() -> String + Send + Sync + 'static) -> Metrics {
        self.more = Some(More(Arc::new(more)));
        self
    }

    /// The counters of one queue.
    pub fn queue(&self, index: u16) -> Option<&Arc<QueueCounters>> {
        self.queues.get(usize::from(index))
    }

    /// All counters as Prometheus text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        self.family(&mut text, "kicks", "Doorbells of the driver.", |c| &c.kicks);
        self.family(&mut text, "calls", "Signals to the driver.", |c| &c.calls);
        self.family(&mut text, "batches", "Batches published.", |c| &c.batches);
        self.family(&mut text, "polls", "Waits ended by polling.", |c| &c.polls);
        self.family(&mut text, "sleeps", "Waits that slept.", |c| &c.sleeps);
        self.family(&mut text, "requests", "Requests completed.", |c| {
            &c.requests
        });
        self.family(&mut text, "errors", "Requests that failed.", |c| &c.errors);
        self.family(&mut text, "dropped", "Packets dropped.", |c| &c.dropped);
        self.family(&mut text, "throttled", "Waits for a rate limit.", |c| {
            &c.throttled
        });
        self.family(&mut text, "bytes_to_guest", "Bytes to the guest.", |c| {
            &c.bytes_to_guest
        });
        self.family(
            &mut text,
            "bytes_from_guest",
            "Bytes from the guest.",
            |c| &c.bytes_from_guest,
        );
        self.latency(&mut text);
        if let Some(More(more)) = &self.more {
            text.push_str(&more());
        }
        text
    }

    fn latency(&self, text: &mut String) {
        const NAME: &str = "berth_latency_seconds";
        let device = self.device;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "# HELP {NAME} From taking a request out of the ring to its used entry."
        );
        let _ = writeln!(text, "# TYPE {NAME} histogram");
        for (index, queue) in self.queues.iter().enumerate() {
            let labels = format!("device=\"{device}\",queue=\"{index}\"");
            let mut all = 0;
            for (bound_us, count) in queue.latency.cumulative() {
                let bound = bound_us.map_or("+Inf".to_owned(), |us| decimal(us, 6));
                let _ = writeln!(text, "{NAME}_bucket{{{labels},le=\"{bound}\"}} {count}");
                all = count;
            }
            let sum = decimal(queue.latency.sum_ns(), 9);
            let _ = writeln!(text, "{NAME}_sum{{{labels}}} {sum}");
            let _ = writeln!(text, "{NAME}_count{{{labels}}} {all}");
        }
    }

    fn family(
        &self,
        text: &mut String,
        name: &str,
        help: &str,
        value: impl Fn(&QueueCounters) -> &Counter,
    ) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP berth_{name}_total {help}");
        let _ = writeln!(text, "# TYPE berth_{name}_total counter");
        for (index, queue) in self.queues.iter().enumerate() {
            let device = self.device;
            let value = value(queue).get();
            let _ = writeln!(
                text,
                "berth_{name}_total{{device=\"{device}\",queue=\"{index}\"}} {value}"
            );
        }
    }
}

/// `value` · 10^-`places`, exactly, with no zeros at its end.
fn decimal(value: u64, places: usize) -> String {
    let unit = 10_u64.pow(places as u32);
    let text = format!("{}.{:0places$}", value / unit, value % unit);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Answers connections on the metrics socket until dropped. Then the socket is removed, on the
/// thread that drops this.
#[derive(Debug)]
pub struct MetricsServer {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    /// After the thread, which shares it.
    _listener: Arc<Listener>,
}

/// How long a peer of the metrics socket may take to send its request or to read the answer.
const PEER_TIMEOUT: Duration = Duration::from_millis(500);

impl MetricsServer {
    /// Answers on `listener`, on a thread called `metrics`.
    pub fn start(listener: Listener, metrics: Metrics) -> io::Result<MetricsServer> {
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let thread_stop = stop.try_clone()?;
        let listener = Arc::new(listener);
        let shared = Arc::clone(&listener);
        let thread = std::thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || match sandbox::enter_thread(ThreadKind::Helper) {
                Ok(()) => answer_all(&shared, &thread_stop, &metrics),
                Err(error) => error!(%error, "no sandbox for this thread, so no metrics"),
            })?;
        Ok(MetricsServer {
            stop,
            thread: Some(thread),
            _listener: listener,
        })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer_all(listener: &Listener, stop: &EventFd, metrics: &Metrics) {
    loop {
        let mut slots = [
            sys::poll_slot(stop.as_raw_fd(), libc::POLLIN),
            sys::poll_slot(listener.as_fd().as_raw_fd(), libc::POLLIN),
        ];
        if sys::poll(&mut slots, -1).is_err() || slots[0].revents != 0 {
            return;
        }
        match listener.accept() {
            // A peer that goes away, or sends nothing we can read, gets nothing.
            Ok(Some(stream)) => drop(answer(stream, metrics)),
            Ok(None) => {}
            Err(error) => {
                warn!(%error, "metrics socket failed, no more metrics");
                return;
            }
        }
    }
}

fn answer(mut stream: UnixStream, metrics: &Metrics) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    // A request line, or nothing: a plain reader closes its sending side or just waits.
    let mut request = [0; 1024];
    let asked = matches!(stream.read(&mut request), Ok(n) if request[..n].starts_with(b"GET "));
    let body = metrics.render();
    if asked {
        let length = body.len();
        write!(
            stream,
            "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n\
             Content-Length: {length}\r\n\r\n"
        )?;
    }
    stream.write_all(body.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_is_prometheus_text() {
        let metrics = Metrics::new("test", 2);
        let queue = metrics.queue(1).unwrap();
        queue.latency.record(1_500, 2);
        queue.latency.record(60_000_000_000, 1);
        let text = metrics.render();
        let head = "# HELP berth_latency_seconds From taking a request out of the ring to its used entry.\n\
                    # TYPE berth_latency_seconds histogram\n";
        assert!(text.contains(head), "{text}");
        let of_queue_1 = "{device=\"test\",queue=\"1\"";
        let lines: Vec<_> = text
            .lines()
            .filter(|line| line.contains(of_queue_1))
            .collect();
        let latency = |suffix: &str| {
            let start = format!("berth_latency_seconds_{suffix}{of_queue_1}");
            let lines = lines.iter().filter_map(|line| line.strip_prefix(&start));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        let buckets = latency("bucket");
        assert_eq!(buckets.len(), 25);
        assert_eq!(buckets[0], ",le=\"0.000001\"} 0");
        assert_eq!(buckets[1], ",le=\"0.000002\"} 2");
        assert_eq!(buckets[20], ",le=\"1.048576\"} 2");
        assert_eq!(buckets[23], ",le=\"8.388608\"} 2");
        assert_eq!(buckets[24], ",le=\"+Inf\"} 3");
        assert_eq!(latency("sum"), ["} 60.000003"]);
        assert_eq!(latency("count"), ["} 3"]);
    }

    #[test]
    fn decimals_are_exact() {
        assert_eq!(decimal(0, 6), "0");
        assert_eq!(decimal(1_000_000, 6), "1");
        assert_eq!(decimal(1_000_001, 6), "1.000001");
        assert_eq!(decimal(u64::MAX, 9), "18446744073.709551615");
    }
}

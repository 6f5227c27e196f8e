//! `--metrics-socket`: counters as Prometheus text (docs/metrics.md).
//!
//! The thread `metrics` takes one client after the other, asks the driver for its counters and answers: as HTTP/1.0 who
//! sends a request, plain who sends nothing. A client that is slow is cut off.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{LogLimit, balloon_metrics, events};
use crate::devices::virtio::balloon;
use crate::event_loop::rest::{self, Rest};
use crate::event_loop::{Interest, poll_one};
use crate::sandbox::{self, ThreadKind};
use crate::socket::Listener;
use crate::vm::requests::{Command, CounterGroups, Reply, ReplyTo, Request, RequestSender};
use crate::vm::state::VmState;

/// How long a client may take to send its request or to read the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);
/// One that sends nothing for so long is answered plainly.
const PLAIN_AFTER_MS: i32 = 100;
/// How long the driver may take.
const DRIVER_PATIENCE: Duration = Duration::from_secs(10);
const PAGE: u64 = 4096;

const LISTENER: u64 = 0;
const STOP: u64 = 1;
static NOT_TAKEN: LogLimit = LogLimit::new(Duration::from_secs(10));

/// The metrics thread. Dropped, it ends and the socket is removed.
pub struct Metrics {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

struct Server {
    listener: Listener,
    requests: RequestSender,
    /// Signalled with answers, which are waited for otherwise.
    answers: Arc<EventFd>,
    /// Our own memory, opened before files are closed to us.
    statm: File,
}

/// What is known besides the counters.
struct Known {
    state: VmState,
    memory_bytes: u64,
    balloon: Option<balloon::Info>,
    resident_bytes: Option<u64>,
    shared_bytes: Option<u64>,
    events_dropped: u64,
}

/// Serves metrics on that socket until the returned value is dropped.
pub fn start(listener: Listener, statm: File, requests: RequestSender) -> io::Result<Metrics> {
    let stop = EventFd::new(EFD_CLOEXEC)?;
    let epoll = Epoll::new()?;
    let readable = |token| EpollEvent::new(EventSet::IN, token);
    epoll.ctl(
        ControlOperation::Add,
        listener.as_raw_fd(),
        readable(LISTENER),
    )?;
    epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), readable(STOP))?;
    let server = Server {
        listener,
        requests,
        answers: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
        statm,
    };
    let thread = sandbox::spawn(ThreadKind::Metrics, "metrics", move || server.run(&epoll))?;
    Ok(Metrics {
        stop,
        thread: Some(thread),
    })
}

impl Drop for Metrics {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the metrics thread panicked");
        }
    }
}

impl Server {
    fn run(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); 2];
        let (mut rest, listener) = (Rest::default(), self.listener.as_raw_fd());
        loop {
            rest.end_if_due(epoll, listener, LISTENER);
            let count = match epoll.wait(rest::timeout_ms(rest.deadline()), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "metrics have stopped");
                    return;
                }
            };
            if events[..count].iter().any(|event| event.data() == STOP) {
                return;
            }
            match self.listener.accept() {
                // A client that goes or is slow is its own concern.
                Ok(Some(client)) => drop(self.answer(client)),
                Ok(None) => {}
                Err(error) => {
                    if let Some(suppressed) = NOT_TAKEN.pass() {
                        tracing::warn!(%error, suppressed, "cannot take a client of the metrics");
                    }
                    let until = Instant::now() + rest::AFTER_A_FAILURE;
                    rest.begin(epoll, listener, LISTENER, Some(until));
                }
            }
        }
    }

    fn answer(&self, mut client: UnixStream) -> io::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(CLIENT_PATIENCE))?;
        client.set_write_timeout(Some(CLIENT_PATIENCE))?;
        let http = poll_one(client.as_fd(), Interest::Read, PLAIN_AFTER_MS)?
            && client.read(&mut [0; 4096])? > 0;
        let text = self.text();
        if http {
            let len = text.len();
            write!(
                client,
                "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len}\r\n\r\n"
            )?;
        }
        client.write_all(text.as_bytes())
    }

    fn text(&self) -> String {
        let counters = match self.ask(Command::Counters) {
            Some(Reply::Counters(counters)) => counters,
            _ => CounterGroups::new(),
        };
        let (state, memory_bytes, balloon) = match self.ask(Command::Info) {
            Some(Reply::Info(info)) => (info.state, info.config.memory.size_bytes, info.balloon),
            _ => (VmState::NotCreated, 0, None),
        };
        let pages = self.pages();
        let known = Known {
            state,
            memory_bytes,
            balloon,
            resident_bytes: pages.map(|[resident, _]| resident * PAGE),
            shared_bytes: pages.map(|[_, shared]| shared * PAGE),
            events_dropped: events::dropped(),
        };
        render(&counters, &known)
    }

    fn ask(&self, command: Command) -> Option<Reply> {
        let (reply, answered) = channel();
        let reply = ReplyTo::new(0, reply, Arc::clone(&self.answers));
        self.requests.send(Request::Command(command, reply));
        let (_, answer) = answered.recv_timeout(DRIVER_PATIENCE).ok()?;
        answer.ok()
    }

    /// Resident and shared pages of this process.
    fn pages(&self) -> Option<[u64; 2]> {
        let mut buffer = [0; 256];
        let count = self.statm.read_at(&mut buffer, 0).ok()?;
        let text = std::str::from_utf8(&buffer[..count]).ok()?;
        let mut fields = text.split_whitespace().skip(1);
        let mut next = || fields.next()?.parse().ok();
        Some([next()?, next()?])
    }
}

const STATES: [(VmState, &str); 6] = [
    (VmState::NotCreated, "not_created"),
    (VmState::Created, "created"),
    (VmState::Booting, "booting"),
    (VmState::Running, "running"),
    (VmState::Paused, "paused"),
    (VmState::Shutdown, "shutdown"),
];

fn render(counters: &CounterGroups, known: &Known) -> String {
    let mut text = String::new();
    family(
        &mut text,
        "state",
        "gauge",
        "State of the guest: 1 for the one it is in.",
    );
    for (state, name) in STATES {
        let value = u64::from(state == known.state);
        line(&mut text, "state", &format!("state=\"{name}\""), value);
    }
    let mut gauge = |name, help, value: Option<u64>| {
        if let Some(value) = value {
            family(&mut text, name, "gauge", help);
            line(&mut text, name, "", value);
        }
    };
    gauge(
        "guest_memory_bytes",
        "Guest RAM as configured.",
        Some(known.memory_bytes),
    );
    gauge(
        "resident_bytes",
        "Memory of this process, guest RAM that was touched included.",
        known.resident_bytes,
    );
    gauge(
        "shared_bytes",
        "The part of it that is guest RAM or files.",
        known.shared_bytes,
    );
    for (name, value) in counters.get("memory").into_iter().flatten() {
        let name = format!("memory_{name}");
        family(&mut text, &name, "gauge", "Of guest memory.");
        line(&mut text, &name, "", *value);
    }
    vcpus(&mut text, counters);
    backends(&mut text, counters);
    shadow(&mut text, counters);
    balloon_metrics::render(
        &mut text,
        counters.get(balloon::NAME),
        known.balloon.as_ref(),
    );
    for (name, value) in counters.get("irqchip").into_iter().flatten() {
        // What is set up now, or how often something was done.
        let counts =
            ["routing_updates", "line_raises", "ends_of_interrupt"].contains(&name.as_str());
        let (kind, total) = if counts {
            ("counter", "_total")
        } else {
            ("gauge", "")
        };
        let name = format!("irqchip_{name}{total}");
        family(&mut text, &name, kind, "Interrupts and doorbells.");
        line(&mut text, &name, "", *value);
    }
    for (name, value) in counters.get("vmm").into_iter().flatten() {
        let name = format!("{name}_total");
        family(&mut text, &name, "counter", "Of the VMM.");
        line(&mut text, &name, "", *value);
    }
    family(
        &mut text,
        "events_dropped_total",
        "counter",
        "Events that --event-monitor's reader did not take.",
    );
    line(&mut text, "events_dropped_total", "", known.events_dropped);
    text
}

fn vcpus(text: &mut String, counters: &CounterGroups) {
    let vcpus: Vec<_> = counters
        .iter()
        .filter_map(|(group, values)| Some((group.strip_prefix("vcpu")?, values)))
        .collect();
    family(
        text,
        "vcpu_exits_total",
        "counter",
        "Exits to this process by reason.",
    );
    for (vcpu, values) in &vcpus {
        for (name, value) in *values {
            if let Some(reason) = name.strip_prefix("exits_") {
                line(
                    text,
                    "vcpu_exits_total",
                    &format!("vcpu=\"{vcpu}\",reason=\"{reason}\""),
                    *value,
                );
            }
        }
    }
    family(
        text,
        "vcpu_kvm_total",
        "counter",
        "What KVM counts, by its own names.",
    );
    for (vcpu, values) in &vcpus {
        for (name, value) in *values {
            if let Some(stat) = name.strip_prefix("kvm_") {
                line(
                    text,
                    "vcpu_kvm_total",
                    &format!("vcpu=\"{vcpu}\",stat=\"{stat}\""),
                    *value,
                );
            }
        }
    }
    for (name, help) in [
        ("doorbells", "Doorbells that KVM handed to a daemon."),
        ("accesses_unclaimed", "Accesses that no device answered."),
    ] {
        let family_name = format!("vcpu_{name}_total");
        family(text, &family_name, "counter", help);
        for (vcpu, values) in &vcpus {
            if let Some(value) = values.get(name) {
                line(text, &family_name, &format!("vcpu=\"{vcpu}\""), *value);
            }
        }
    }
}

fn backends(text: &mut String, counters: &CounterGroups) {
    family(
        text,
        "backend_connected",
        "gauge",
        "1 while the device's daemon serves it.",
    );
    for (device, values) in counters {
        if let Some(value) = values.get("backend_connected") {
            line(
                text,
                "backend_connected",
                &format!("device=\"{device}\""),
                *value,
            );
        }
    }
}

const SHADOW: [(&str, &str, &str); 5] = [
    (
        "shadow_requests",
        "_total",
        "Requests that shadow queues passed on.",
    ),
    (
        "shadow_copied_in_bytes",
        "_total",
        "Bytes that shadow queues copied out of guest memory.",
    ),
    (
        "shadow_copied_out_bytes",
        "_total",
        "Bytes that shadow queues copied into guest memory.",
    ),
    (
        "shadow_stalls",
        "_total",
        "Requests that had to wait for bounce memory.",
    ),
    (
        "shadow_bounce_bytes",
        "",
        "What bounce memory takes of the host's.",
    ),
];

fn shadow(text: &mut String, counters: &CounterGroups) {
    for (name, total, help) in SHADOW {
        let family_name = format!("{name}{total}");
        let kind = if total.is_empty() { "gauge" } else { "counter" };
        family(text, &family_name, kind, help);
        for (device, values) in counters {
            if let Some(value) = values.get(name) {
                line(text, &family_name, &format!("device=\"{device}\""), *value);
            }
        }
    }
}

// Writing to a string cannot fail.
pub(super) fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(
        text,
        "# HELP berth_vmm_{name} {help}\n# TYPE berth_vmm_{name} {kind}"
    );
}

pub(super) fn line(text: &mut String, name: &str, labels: &str, value: u64) {
    let _ = match labels {
        "" => writeln!(text, "berth_vmm_{name} {value}"),
        labels => writeln!(text, "berth_vmm_{name}{{{labels}}} {value}"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_comment_or_a_sample_of_a_declared_family() {
        let mut counters = CounterGroups::new();
        let mut add = |group: &str, name: &str, value| {
            counters
                .entry(group.into())
                .or_default()
                .insert(name.into(), value);
        };
        add("vcpu0", "exits_io_in", 7);
        add("vcpu0", "kvm_halt_exits", 3);
        add("vcpu0", "doorbells", 5);
        add("_disk0", "backend_connected", 1);
        add("_disk0", "shadow_copied_in_bytes", 11);
        add("_disk0", "shadow_bounce_bytes", 12);
        add("irqchip", "routing_updates", 2);
        add("irqchip", "msis", 4);
        add("vmm", "boots", 1);
        add("memory", "window_bytes", 6);
        let known = Known {
            state: VmState::Running,
            memory_bytes: 1 << 20,
            balloon: None,
            resident_bytes: Some(4096),
            shared_bytes: None,
            events_dropped: 9,
        };
        let text = render(&counters, &known);
        for sample in [
            "berth_vmm_state{state=\"running\"} 1",
            "berth_vmm_state{state=\"paused\"} 0",
            "berth_vmm_vcpu_exits_total{vcpu=\"0\",reason=\"io_in\"} 7",
            "berth_vmm_vcpu_kvm_total{vcpu=\"0\",stat=\"halt_exits\"} 3",
            "berth_vmm_vcpu_doorbells_total{vcpu=\"0\"} 5",
            "berth_vmm_backend_connected{device=\"_disk0\"} 1",
            "berth_vmm_shadow_bounce_bytes{device=\"_disk0\"} 12",
            "berth_vmm_shadow_copied_in_bytes_total{device=\"_disk0\"} 11",
            "berth_vmm_irqchip_routing_updates_total 2",
            "berth_vmm_irqchip_msis 4",
            "berth_vmm_boots_total 1",
            "berth_vmm_memory_window_bytes 6",
            "berth_vmm_guest_memory_bytes 1048576",
            "berth_vmm_events_dropped_total 9",
        ] {
            assert!(
                text.lines().any(|line| line == sample),
                "no {sample} in\n{text}"
            );
        }
        let mut declared = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                declared = rest.split(' ').next().unwrap().to_owned();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&declared), "{line}");
            }
        }
    }
}
